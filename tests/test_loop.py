"""From rollouts to the trainer's batch: attempts, groups, advantages, and what a step reports."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2rl.config import Config
from k2rl.errors import RunError
from k2rl.loop import policy_batch, rollout_metrics
from k2rl.rollouts.groups import attempts
from k2rl.training.batch import BatchTotals
from k2rl.types import Segment, StopReason, Task, Trajectory, Verdict


def task(number: int = 0, kind: str = "add") -> Task:
    return Task(id=f"task-{number}", env="e", kind=kind, split="train", seed=number)


def episode(
    group: int,
    number: int,
    reward: float | None,
    stop: StopReason = "env_done",
    sampled: int = 2,
    **components: float,
) -> Trajectory:
    """An episode whose first sampled token tells it from all others; `reward=None` is a failed judgement."""
    segments = [Segment((1, 2, 3), sampled=False)]
    if sampled:
        ids = (100 * group + number, *range(sampled - 1))
        segments.append(Segment(ids, True, (-0.5,) * sampled, weight_version=0))
    verdict = Verdict.failed("broken") if reward is None else Verdict.scored(reward, components)
    return Trajectory(
        f"{group}-{number}", f"group-{group}", task(group), 1.0, segments, [], stop, verdict=verdict
    )


def batch(trajectories: Sequence[Trajectory], **rollout: float) -> tuple[list[dict[str, float]], int]:
    """The groups as advantages by sequence id."""
    config = Config()
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    groups, totals, _ = policy_batch(config, trajectories, step=1, version=0)
    return [{sequence.id: sequence.advantage for sequence in group} for group in groups], totals.sequences


def test_the_better_response_gets_the_greater_advantage_and_keeps_its_tokens() -> None:
    trajectories = [episode(0, 0, 1.0), episode(0, 1, 0.0), episode(0, 2, 0.5)]
    groups, totals, shaped = policy_batch(Config(), trajectories, step=1, version=0)
    assert shaped == 0.5
    assert totals == BatchTotals(sequences=3, tokens=6)
    assert [sequence.advantage for sequence in groups[0]] == [0.5, -0.5, 0.0]
    for sequence, trajectory in zip(groups[0], trajectories, strict=True):
        assert list(sequence.token_ids) == trajectory.token_ids
        assert list(sequence.sampled_mask) == [False] * 3 + [True] * 2
        assert list(sequence.behaviour_logprobs) == trajectory.behaviour_logprobs


def test_groups_that_come_in_turns_are_put_together() -> None:
    trajectories = [episode(number % 2, number, float(number > 2)) for number in range(6)]
    groups, num_sequences = batch(trajectories)
    assert groups == [
        {"0-0": pytest.approx(-1 / 3), "0-2": pytest.approx(-1 / 3), "0-4": pytest.approx(2 / 3)},
        {"1-1": pytest.approx(-2 / 3), "1-3": pytest.approx(1 / 3), "1-5": pytest.approx(1 / 3)},
    ]
    assert num_sequences == 6


def test_only_the_budget_costs() -> None:
    """With a penalty of 0.5: rewards 1, 1 and 1 become 0.5, 1 and 1; a full context is not penalised."""
    trajectories = [episode(0, 0, 1.0, "token_budget"), episode(0, 1, 1.0, "context"), episode(0, 2, 1.0)]
    groups, _ = batch(trajectories)
    assert groups == [
        {"0-0": pytest.approx(-1 / 3), "0-1": pytest.approx(1 / 6), "0-2": pytest.approx(1 / 6)}
    ]


def test_failed_and_empty_episodes_are_no_part_of_their_group() -> None:
    trajectories = [
        episode(0, 0, 1.0),
        episode(0, 1, None),
        episode(0, 2, 0.0),
        episode(0, 3, 0.0, sampled=0),
    ]
    assert batch(trajectories) == ([{"0-0": 0.5, "0-2": -0.5}], 2)


def test_a_group_of_one_scored_episode_teaches_nothing_and_does_not_count() -> None:
    assert batch([episode(0, 0, 1.0), episode(0, 1, None)]) == ([], 0)


def test_a_uniform_group_counts_in_the_average_and_costs_nothing() -> None:
    trajectories = [
        *(episode(0, number, 1.0) for number in range(3)),
        *(episode(1, number, number) for number in range(2)),
    ]
    assert batch(trajectories) == ([{"1-0": -0.5, "1-1": 0.5}], 5)
    groups, num_sequences = batch(trajectories, drop_uniform_groups=False)
    assert groups[0] == {"0-0": 0.0, "0-1": 0.0, "0-2": 0.0}
    assert num_sequences == 5


rewards = st.one_of(st.none(), st.floats(0, 1))


@given(st.lists(st.lists(rewards, min_size=1, max_size=6), max_size=5))
def test_every_group_sums_to_zero_and_no_failure_is_in_it(groups: list[list[float | None]]) -> None:
    trajectories = [episode(g, n, reward) for g, group in enumerate(groups) for n, reward in enumerate(group)]
    learned, num_sequences = batch(trajectories)
    scored = [[r for r in group if r is not None] for group in groups]
    assert num_sequences == sum(len(group) for group in scored if len(group) > 1)
    assert len(learned) == sum(len(set(group)) > 1 for group in scored)
    for group in learned:
        assert math.fsum(group.values()) == pytest.approx(0, abs=1e-9)
    failed = {trajectory.id for trajectory in trajectories if trajectory.failed}
    assert not failed & {id for group in learned for id in group}


def test_a_task_drawn_twice_makes_two_groups_with_seeds_of_their_own() -> None:
    tasks = [task(1), task(2), task(1)]
    drawn = [a for i, t in enumerate(tasks) for a in attempts(t, i, 4, seed=0, step=3, temperature=0.9)]
    assert len(drawn) == 12
    assert [attempt.task.id for attempt in drawn[::4]] == ["task-1", "task-2", "task-1"]
    for unique in ("id", "seed"):
        assert len({getattr(attempt, unique) for attempt in drawn}) == 12
    groups = [attempt.group_id for attempt in drawn]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [4, 4, 4]
    assert {attempt.temperature for attempt in drawn} == {0.9}


def test_attempts_depend_on_seed_and_step_alone() -> None:
    again = attempts(task(1), 0, 2, 0, 3, 1.0)
    assert attempts(task(1), 0, 2, 0, 3, 1.0) == again
    others = attempts(task(1), 0, 2, 1, 3, 1.0) + attempts(task(1), 0, 2, 0, 4, 1.0)
    assert not {attempt.seed for attempt in others} & {attempt.seed for attempt in again}


def test_tokens_of_older_weights_are_context_if_they_are_to_be_masked() -> None:
    """Of three responses one is half old, one old and one new; advantages are those of whole responses."""
    mixed, old, new = (episode(0, k, float(k == 0)) for k in range(3))
    mixed.segments.append(Segment((7, 8), True, (-1.0, -2.0), weight_version=1))
    new.segments[1] = Segment((9, 9), True, (-0.5, -0.5), weight_version=1)
    config = Config()
    config.rollout.old_tokens = "mask"
    ((first, last),), totals, _ = policy_batch(config, [mixed, old, new], 1, version=1)
    assert (first.id, last.id) == ("0-0", "0-2")
    assert first.sampled_mask == (False,) * 5 + (True, True)
    assert first.behaviour_logprobs == (-1.0, -2.0)
    assert first.advantage == pytest.approx(2 / 3)
    assert totals == BatchTotals(sequences=3, tokens=4)
    config.rollout.old_tokens = "train"
    ((first, *_),), totals, _ = policy_batch(config, [mixed, old, new], 1, version=1)
    assert (sum(first.sampled_mask), totals.tokens) == (4, 8)


def test_a_uniform_group_does_not_count_where_another_was_drawn_for_it() -> None:
    trajectories = [*(episode(0, k, 1.0) for k in range(3)), *(episode(1, k, k) for k in range(2))]
    assert batch(trajectories, refill=2)[1] == 2


def test_metrics_are_of_the_scored_episodes() -> None:
    trajectories = [
        episode(0, 0, 1.0, tool_used=1.0, style=0.2),
        episode(0, 1, 0.0, "token_budget", sampled=4, tool_used=0.0),
        episode(0, 2, 0.5, "context", sampled=6),
        episode(0, 3, None),
    ]
    metrics = rollout_metrics(trajectories, seconds=2.0)
    assert metrics == {
        "reward/mean": 0.5,
        "reward/kind/add": 0.5,
        "reward/component/style": 0.2,
        "reward/component/tool_used": 0.5,
        "rollout/episodes": 4,
        "rollout/failed": 1,
        "reward/judge_failed_share": 0.25,
        "rollout/tokens_mean": 4.0,
        "rollout/truncated_share": pytest.approx(1 / 3),
        "rollout/context_share": pytest.approx(1 / 3),
        "rollout/tokens_per_second": 6.0,
        "rollout/episodes_per_second": 2.0,
        "rollout/temperature": 1.0,
    }


def test_a_step_without_a_score_has_no_metrics() -> None:
    with pytest.raises(RunError, match="no episode of the step was scored"):
        rollout_metrics([episode(0, 0, None)], 1.0)


@given(st.integers(0, 10**6))
def test_a_judge_that_fails_one_time_in_ten_leaves_the_batch_of_the_others_exactly(seed: int) -> None:
    """The loss is a function of this batch alone (groups, advantages, what it is averaged over)."""
    draw = random.Random(seed)
    values = {(g, k): draw.random() for g in range(6) for k in range(6)}
    lost = {key for key in values if draw.random() < 0.1}
    flaky = [episode(g, k, None if (g, k) in lost else value) for (g, k), value in values.items()]
    clean = [episode(g, k, value) for (g, k), value in values.items() if (g, k) not in lost]
    assert policy_batch(Config(), flaky, 1, version=0) == policy_batch(Config(), clean, 1, version=0)
    metrics = rollout_metrics(flaky, None)
    assert metrics["reward/judge_failed_share"] == pytest.approx(len(lost) / len(flaky))
    assert metrics["reward/mean"] == rollout_metrics(clean, None)["reward/mean"]
