"""What the start-up checks build, and that they put it away."""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from typing import Any

import psutil
import pytest

from envs.calculator import CalculatorEnv
from k2rl.composition import compose
from k2rl.errors import ConfigError
from k2rl.preflight import Preflight, preflight
from rubrics.critics.self_critique import SelfCritique


class Counting(CalculatorEnv):
    """Counts its instances; `reset` hangs once `hangs` is set."""

    made = closed = 0
    hangs = False

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if self.hangs:
            threading.Event().wait()
        return super().reset(seed=seed, options=options)

    def close(self) -> None:
        type(self).closed += 1


def prepare(*overrides: str) -> Preflight:
    return preflight(compose(["experiment=tiny", f"env.id={__name__}:Counting", *overrides]))


def test_every_environment_that_was_built_is_closed() -> None:
    with closing(prepare("warm_start.steps=1", "warm_start.demos_per_step=2")) as prepared:
        assert [len(batch) for batch in prepared.warm_start] == [2]
        assert asyncio.run(prepared.opening(prepared.eval_tasks[0]))
    assert Counting.made == Counting.closed >= 5


def test_few_demonstrations_are_gone_through_again() -> None:
    overrides = ["warm_start.steps=3", "warm_start.demos_per_step=4", "warm_start.demonstrations=6"]
    with closing(prepare(*overrides)) as prepared:
        shown = [sequence.id for batch in prepared.warm_start for sequence in batch]
    assert [len(batch) for batch in prepared.warm_start] == [4, 4, 4]
    assert set(shown[:6]) == set(shown[6:])
    assert len(set(shown)) == 6


def test_judgements_beside_demonstrations_are_for_runs_that_have_a_critic() -> None:
    overrides = ["warm_start.steps=2", "warm_start.demos_per_step=4", "warm_start.judgements=3"]
    with closing(prepare("rubric=self_critique", "rubric.kwargs.brief=true", *overrides)) as prepared:
        assert [len(batch) for batch in prepared.warm_start] == [7, 7]
        drawn = [s.id for batch in prepared.warm_start for s in batch if s.id.startswith("drawn-")]
    assert drawn == [f"drawn-{n}" for n in range(6)]
    with pytest.raises(ConfigError, match="does nothing without rubric=self_critique"):
        prepare(*overrides)
    with pytest.raises(ConfigError, match="demonstrations that differ"):
        prepare("rubric=self_critique", "warm_start.steps=1", "warm_start.demos_per_step=1", *overrides[2:])


def test_no_environment_stays_open_where_a_check_fails() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        prepare("budget.default=500")
    assert Counting.made == Counting.closed


def test_a_step_has_the_same_tasks_whenever_it_is_asked_for() -> None:
    with closing(prepare()) as prepared:

        def ids(step: int) -> list[str]:
            return [task.id for task in asyncio.run(prepared.train_tasks(step))]

        assert ids(1) == ids(1) != ids(2)
        assert len(ids(1)) == 2


def test_an_environment_that_hangs_in_the_self_check_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(prepare()) as prepared:
        monkeypatch.setattr(Counting, "hangs", True)
        prepared.config.rollout.episode_deadline_s = 0.1
        with pytest.raises(ConfigError, match=r"Counting' fails on task .*: not done within"):
            asyncio.run(prepared.opening(prepared.eval_tasks[0]))


def test_sandboxes_of_the_checks_end_with_them() -> None:
    overrides = ["experiment=tiny", "env=python_math", "warm_start=none", "inference.max_model_len=2048"]
    with closing(preflight(compose(overrides))) as prepared:
        assert prepared.eval_tasks
        children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
        assert [words for words in children if "sandboxes.bubblewrap.keeper" in words] == []


def test_the_rubric_reward_run_is_the_critics_alone_and_is_evaluated_by_the_verifier() -> None:
    with closing(preflight(compose(["experiment=rubric_reward", "model=tiny"]))) as prepared:
        rubric = prepared.rubric
    assert isinstance(rubric, SelfCritique)
    assert (rubric.verifier_weight, rubric.reward_range, rubric.needs_group) == (0, (0, 1), True)
    assert prepared.config.rubric.critic_examples > 0
