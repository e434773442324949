"""Many episodes: order, bounds, and what becomes of failures."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from envs.base import TextEnv
from envs.calculator import CalculatorEnv
from k2rl.config import Config
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import EngineDeadError, Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.scheduler import RolloutScheduler, check_failures
from k2rl.types import Trajectory, Verdict
from rubrics.base import Rubric


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


class Answering:
    """Always the same turn; keeps count of how many requests are open at once."""

    def __init__(self, chat: ChatTemplate, text: str = "7") -> None:
        self._ids = tuple(chat.turn_ids(text))
        self.open = self.most_open = 0

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        for _ in range(5):
            await asyncio.sleep(0)
        self.open -= 1
        return Generation(self._ids, (0.0,) * len(self._ids), ((0, 0),), "stop")


class Dead:
    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        raise EngineDeadError("gone")


def attempts(count: int) -> list[Attempt]:
    tasks = islice(CalculatorEnv().tasks("train", 0), count)
    return [Attempt(f"a{index}", f"g{index}", task, 1.0, index) for index, task in enumerate(tasks)]


def run(
    engine: Any, chat: ChatTemplate, count: int, make_env: Callable[[], Any] = CalculatorEnv, **rollout: Any
) -> list[Trajectory]:
    config = Config()
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    scheduler = RolloutScheduler(config, engine, chat, make_env, CalculatorEnv().rubric)
    return asyncio.run(scheduler.run(attempts(count)))


def test_results_come_in_order_and_judged(chat: ChatTemplate) -> None:
    trajectories = run(Answering(chat), chat, 9)
    assert [trajectory.id for trajectory in trajectories] == [f"a{index}" for index in range(9)]
    assert all(trajectory.reward == 0.0 for trajectory in trajectories)


def test_concurrency_is_bounded_and_used(chat: ChatTemplate) -> None:
    engine = Answering(chat)
    run(engine, chat, 20, max_concurrent=3)
    assert engine.most_open == 3


class Exploding(CalculatorEnv):
    def step(self, action: str) -> Any:
        raise OSError("the database is gone")


def test_an_environment_that_raises_is_a_failure_and_not_a_zero(chat: ChatTemplate) -> None:
    (trajectory,) = run(Answering(chat), chat, 1, Exploding)
    assert trajectory.failed
    assert trajectory.verdict is not None
    assert trajectory.verdict.value is None
    assert "OSError: the database is gone" in (trajectory.verdict.failure or "")
    assert "a0" in (trajectory.verdict.failure or "")


def refuses() -> CalculatorEnv:
    raise ConfigError("no container left")


class BadClose(CalculatorEnv):
    def close(self) -> None:
        raise OSError("the container does not stop")


class Cancelling(CalculatorEnv):
    async def step(self, action: str) -> Any:  # type: ignore[override]
        raise asyncio.CancelledError


class TimesOut(CalculatorEnv):
    def step(self, action: str) -> Any:
        raise TimeoutError("the browser did not answer")


class Exits(CalculatorEnv):
    def step(self, action: str) -> Any:
        raise SystemExit(3)


class Stops(CalculatorEnv):
    def step(self, action: str) -> Any:
        return next(iter(()))


@pytest.mark.parametrize(
    ("make_env", "reason"),
    [
        (refuses, "ConfigError: no container left"),
        (BadClose, "close(): OSError: the container does not stop"),
        (Cancelling, "CancelledError"),
        (TimesOut, "TimeoutError: the browser did not answer"),
        (Exits, "SystemExit: 3"),
        (Stops, "StopIteration"),
    ],
)
def test_whatever_an_environment_does_is_its_episodes_failure(
    chat: ChatTemplate, make_env: Callable[[], CalculatorEnv], reason: str
) -> None:
    made = iter([make_env, CalculatorEnv])
    trajectories = run(Answering(chat), chat, 2, lambda: next(made)(), max_concurrent=1)
    assert [trajectory.failed for trajectory in trajectories] == [True, False]
    assert reason in (trajectories[0].verdict.failure or "")  # type: ignore[union-attr]


def test_a_prompt_that_does_not_fit_is_a_failure_and_not_a_zero(chat: ChatTemplate) -> None:
    config = Config()
    config.inference.max_model_len = 20
    scheduler = RolloutScheduler(config, Answering(chat), chat, CalculatorEnv, CalculatorEnv().rubric)
    (trajectory,) = asyncio.run(scheduler.run(attempts(1)))
    assert trajectory.failed
    assert "max_model_len=20" in (trajectory.verdict.failure or "")  # type: ignore[union-attr]


def test_our_own_cancellation_is_raised_and_environments_are_closed(chat: ChatTemplate) -> None:
    closed = []

    class Waiting(CalculatorEnv):
        async def step(self, action: str) -> Any:  # type: ignore[override]
            asyncio.current_task().get_loop().call_soon(whole.cancel)  # type: ignore[union-attr]
            await asyncio.Event().wait()

        def close(self) -> None:
            closed.append(self)

    async def scenario() -> None:
        nonlocal whole
        scheduler = RolloutScheduler(Config(), Answering(chat), chat, Waiting, CalculatorEnv().rubric)
        whole = asyncio.ensure_future(scheduler.run(attempts(3)))
        with pytest.raises(asyncio.CancelledError):
            await whole

    whole: asyncio.Future[Any]
    asyncio.run(scenario())
    assert len(closed) == 3


class Hanging(CalculatorEnv):
    async def step(self, action: str) -> Any:  # type: ignore[override]
        await asyncio.Event().wait()


class Blocking(CalculatorEnv):
    def step(self, action: str) -> Any:
        never_answered()


def never_answered() -> None:
    threading.Event().wait()


@pytest.mark.parametrize(
    ("make_env", "where"),
    [
        (Hanging, "it waited for the model, or for async code"),
        (
            Blocking,
            r"Blocking.step stands at .*/threading.py:\d+ in wait, .* in never_answered, .* in step",
        ),
    ],
)
def test_an_episode_past_its_deadline_is_a_failure(
    make_env: Callable[[], TextEnv], where: str, chat: ChatTemplate
) -> None:
    (trajectory,) = run(Answering(chat), chat, 1, make_env, episode_deadline_s=1)
    assert trajectory.failed
    assert trajectory.verdict is not None
    said = f"not over after rollout.episode_deadline_s=1 s: {where}$"
    assert re.search(said, trajectory.verdict.failure or "")


def test_a_dead_engine_ends_the_batch(chat: ChatTemplate) -> None:
    with pytest.raises(EngineDeadError, match="gone"):
        run(Dead(), chat, 5)


def test_a_judge_that_raises_is_a_failure(chat: ChatTemplate) -> None:
    class Broken(Rubric):
        async def judge(self, trajectory: Trajectory) -> Verdict:
            raise KeyError("answer")

    scheduler = RolloutScheduler(Config(), Answering(chat), chat, CalculatorEnv, Broken())
    (trajectory,) = asyncio.run(scheduler.run(attempts(1)))
    assert trajectory.failed
    assert "KeyError" in (trajectory.verdict.failure or "")  # type: ignore[union-attr]


def test_too_many_failures_stop_the_run(chat: ChatTemplate) -> None:
    failed = run(Answering(chat), chat, 2, Exploding)
    good = run(Answering(chat), chat, 2)
    check_failures(failed + good, 0.5, "step 1")
    with pytest.raises(RunError, match=r"step 1: 2 of 4 episodes failed.*OSError"):
        check_failures(failed + good, 0.4, "step 1")
