"""Advantages, mismatch, temperature and budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2rl.config import BudgetConfig, TemperatureConfig
from k2rl.errors import ConfigError
from k2rl.objective.advantages import group_advantages, is_uniform
from k2rl.objective.budget import budget_for, length_rewards, penalised_reward, shaped_rewards
from k2rl.objective.mismatch import Mismatch
from k2rl.objective.temperature import temperature_at
from k2rl.types import StopReason

rewards = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=16)
temperatures = st.floats(0.01, 5.0)


@given(rewards)
def test_advantages_are_rewards_less_their_mean(group: list[float]) -> None:
    advantages = group_advantages(group)
    scale = max(1.0, *map(abs, group))
    assert abs(math.fsum(advantages)) <= 1e-9 * scale
    for index, advantage in enumerate(advantages):
        assert advantage == pytest.approx(group[index] - math.fsum(group) / len(group), abs=1e-9 * scale)


@given(st.floats(-1e6, 1e6), st.integers(1, 9))
def test_a_uniform_group_has_exactly_no_advantage(reward: float, size: int) -> None:
    assert group_advantages([reward] * size) == [0.0] * size
    assert is_uniform([reward] * size)


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="reward 1 of the group is nan"):
        group_advantages([1.0, math.nan])
    with pytest.raises(ValueError, match="empty"):
        group_advantages([])


def test_mismatch_over_micro_batches() -> None:
    mismatch = Mismatch()
    mismatch.add(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]))
    mismatch.add(torch.tensor([]), torch.tensor([]))
    mismatch.add(torch.tensor([-3.0]), torch.tensor([-2.0]))
    assert mismatch.metrics() == pytest.approx(
        {
            "logprob_gap_mean": 0.5,
            "logprob_gap_max": 1.0,
            "ratio_min": math.exp(-1.0),
            "ratio_max": math.exp(0.5),
        }
    )
    with pytest.raises(ValueError, match="against"):
        mismatch.add(torch.zeros(2), torch.zeros(3))


def test_mismatch_without_tokens_and_with_absurd_ones() -> None:
    mismatch = Mismatch()
    assert mismatch.metrics()["ratio_max"] == 1.0
    mismatch.add(torch.tensor([0.0]), torch.tensor([-1e4]))
    assert mismatch.metrics()["ratio_max"] == math.inf


def test_mismatch_of_non_finite_log_probs_shows() -> None:
    mismatch = Mismatch()
    mismatch.add(torch.tensor([math.nan, -1.0]), torch.tensor([-1.0, -1.0]))
    assert math.isnan(mismatch.metrics()["logprob_gap_mean"])


@given(st.sampled_from(["linear", "cosine"]), temperatures, temperatures, st.integers(2, 200))
def test_schedules_go_from_start_to_end_without_turning(
    schedule: str, start: float, end: float, total: int
) -> None:
    config = TemperatureConfig(schedule=schedule, start=start, end=end)
    values = [temperature_at(config, step, total) for step in range(total)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == pytest.approx(end)
    steps = [later - earlier for earlier, later in pairwise(values)]
    assert all(step * (end - start) >= -1e-9 for step in steps)


@given(temperatures, st.integers(1, 50), st.data())
def test_constant_and_single_step_stay_at_start(start: float, total: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    assert temperature_at(TemperatureConfig("constant", start, 0.1), step, total) == start
    assert temperature_at(TemperatureConfig("cosine", start, 0.1), 0, 1) == start


@given(st.lists(st.floats(-1, 1), max_size=20), st.integers(1, 4))
def test_the_reward_lowers_it_once_and_for_all(rewards: list[float], reward_steps: int) -> None:
    config = TemperatureConfig("reward", 1.0, 0.4, reward_at=0.5, reward_steps=reward_steps)
    values = [temperature_at(config, step, 21, rewards[:step]) for step in range(len(rewards) + 1)]
    windows = [rewards[end - reward_steps : end] for end in range(reward_steps, len(rewards) + 1)]
    first = next((n for n, window in enumerate(windows, reward_steps) if fmean(window) >= 0.5), len(values))
    assert values == [1.0] * first + [0.4] * (len(values) - first)


def test_cosine_is_flat_at_its_ends() -> None:
    config = TemperatureConfig("cosine", 1.0, 0.0)
    assert temperature_at(config, 5, 11) == pytest.approx(0.5)
    assert 1.0 - temperature_at(config, 1, 11) < 0.1 / 2


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature\.schedule='stair'"):
        temperature_at(TemperatureConfig(schedule="stair"), 0, 2)
    with pytest.raises(ValueError, match="step 2"):
        temperature_at(TemperatureConfig(), 2, 2)


def test_budgets_by_kind() -> None:
    config = BudgetConfig(default=96, per_kind={"hard": 200}, penalty=0.5)
    assert budget_for("hard", config) == 200
    assert budget_for("easy", config) == 96


def test_only_the_budget_is_penalised() -> None:
    config = BudgetConfig(penalty=0.25)
    assert penalised_reward(1.0, "token_budget", config) == 0.75
    for stop_reason in ("env_done", "env_truncated", "max_turns", "context", "failed"):
        assert penalised_reward(1.0, stop_reason, config) == 1.0


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.05, 5))
def test_baselines_are_their_definitions(rewards: list[float], tau: float) -> None:
    if is_uniform(rewards):
        for baseline in ("leave_one_out", "normalised", "exponential"):
            assert group_advantages(rewards, baseline, tau) == [0.0] * len(rewards)
        return
    others = [fmean(rewards[:i] + rewards[i + 1 :]) for i in range(len(rewards))]
    expected = [reward - other for reward, other in zip(rewards, others, strict=True)]
    assert group_advantages(rewards, "leave_one_out") == pytest.approx(expected, abs=1e-9)
    value = tau * math.log(fmean(math.exp(reward / tau) for reward in rewards))
    assert group_advantages(rewards, "exponential", tau) == pytest.approx(
        [r - value for r in rewards], abs=1e-9
    )
    # Rewards that differ in their last bit only leave nothing else to tell them apart by.
    if max(rewards) - min(rewards) > 1e-6:
        normalised = group_advantages(rewards, "normalised")
        assert stdev(normalised) == pytest.approx(1)
        assert fmean(normalised) == pytest.approx(0, abs=1e-6)


def test_baselines_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="tau"):
        group_advantages([0.0, 1.0], "exponential")
    with pytest.raises(ValueError, match="median"):
        group_advantages([0.0, 1.0], "median")


def test_a_step_is_taken_once() -> None:
    config = TemperatureConfig("step", 1.0, 0.5, step_at=0.4)
    assert [temperature_at(config, step, 5) for step in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert temperature_at(replace(config, step_at=0.0), 0, 1) == 1.0


@given(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=9))
def test_length_rewards_prefer_short_and_correct(group: list[tuple[int, bool]]) -> None:
    lengths, correct = zip(*group, strict=True)
    rewards = length_rewards(lengths, correct)
    for (length, right), reward in zip(group, rewards, strict=True):
        assert -0.5 <= reward <= (0.5 if right else 0)
        for (other, also), theirs in zip(group, rewards, strict=True):
            if length < other and right >= also:
                assert reward >= theirs
    if len(set(lengths)) == 1:
        assert rewards == [0.0] * len(group)
    elif all(correct):
        assert (max(rewards), min(rewards)) == (0.5, -0.5)


def shaped(config: BudgetConfig, step: int, rewards: list[float] | None = None) -> list[float]:
    """Of four responses of 10 to 40 tokens, the third of which was cut off."""
    ends: list[StopReason] = ["env_done", "env_done", "token_budget", "env_done"]
    return shaped_rewards(rewards or [1.0, 1.0, 1.0, 0.0], [10, 20, 30, 40], ends, config, step)


def test_the_length_reward_begins_after_its_warm_up() -> None:
    config = BudgetConfig(penalty=0.25, length_weight=0.6, length_warmup_steps=3)
    assert shaped(config, 3) == [1.0, 1.0, 0.75, 0.0]
    assert shaped(config, 4) == pytest.approx([1.3, 1.1, 0.65, -0.3])


def test_toggle_takes_turns_and_binds_only_where_enough_is_correct() -> None:
    config = BudgetConfig(penalty=0.0, toggle_steps=2, toggle_percentile=50, toggle_accuracy=0.75)
    assert [shaped(config, step) for step in (1, 2, 5)] == [[1.0, 1.0, 0.0, 0.0]] * 3
    assert [shaped(config, step) for step in (3, 4)] == [[1.0, 1.0, 1.0, 0.0]] * 2
    assert shaped(config, 1, [1.0, 0.0, 0.0, 1.0]) == [1.0, 0.0, 0.0, 1.0]
    assert shaped(config, 1, [1.0, 1.0, -1.0, 1.0]) == [1.0, 1.0, -1.0, 0.0]
    assert shaped(replace(config, toggle_percentile=0), 1) == [1.0, 0.0, 0.0, 0.0]
    assert shaped(replace(config, toggle_accuracy=0), 1, [0.1, 0.2, 0.3, 0.4]) == [0.1, 0.2, 0.3, 0.4]
