import asyncio
import math
import time

import numpy as np
import pytest

import rubrics.deadline
from k2rl.types import Task, Trajectory, Verdict
from rubrics import EnvironmentReward, Rubric, judge_safely

TASK = Task(id="task-1", env="test", kind="default", split="train", seed=0)


def trajectory(**fields) -> Trajectory:
    return Trajectory(id="episode-7", group_id="group-1", task=TASK, temperature=1.0, **fields)


class Says(Rubric):
    """Gives whatever it was made with, or raises it."""

    def __init__(self, answer):
        self.answer = answer

    async def judge(self, trajectory):
        await asyncio.sleep(0)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def judged(rubric, deadline_s=5.0, **fields) -> Verdict:
    return asyncio.run(judge_safely(rubric, trajectory(**fields), deadline_s))


def test_a_sound_verdict_passes():
    verdict = judged(Says(Verdict.scored(0.5, {"style": 3.0})))
    assert verdict == Verdict(value=0.5, components={"style": 3.0})


def test_numpy_numbers_become_floats():
    verdict = judged(Says(Verdict(value=np.float32(0.5), components={"n": np.int64(2)})))
    assert verdict == Verdict.scored(0.5, {"n": 2.0})
    assert type(verdict.value) is float
    assert type(verdict.components["n"]) is float


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (KeyError("answer"), "KeyError: 'answer'"),
        (RuntimeError("judge unreachable"), "RuntimeError: judge unreachable"),
        (TimeoutError("read timed out"), "TimeoutError: read timed out"),
        (None, "TypeError: judge returned NoneType, not a Verdict"),
        (0.5, "TypeError: judge returned float, not a Verdict"),
        (Verdict(value=None), "ValueError: verdict value is None"),
        (Verdict(value="1"), "ValueError: verdict value is 1, not a finite number"),
        (Verdict(value=math.nan), "ValueError: verdict value is nan"),
        (Verdict(value=math.inf), "ValueError: verdict value is inf"),
        (Verdict(value=1.0, components={"style": math.nan}), "ValueError: verdict style is nan"),
        (Verdict(value=1.5), "lies outside reward_range (0, 1)"),
        (Verdict(value=-0.1), "lies outside reward_range (0, 1)"),
    ],
    ids=str,
)
def test_no_sound_verdict_is_a_failure_with_its_reason_and_never_a_zero(answer, reason):
    verdict = judged(Says(answer))
    assert not verdict.ok
    assert verdict.value is None
    assert verdict.failure.startswith("Says on trajectory episode-7: ")
    assert reason in verdict.failure


def test_a_judge_that_is_not_a_coroutine_fails():
    class Blocking(Rubric):
        def judge(self, trajectory):
            return Verdict.scored(1.0)

    assert "TypeError" in judged(Blocking()).failure


def test_a_rubrics_own_failure_passes():
    assert judged(Says(Verdict.failed("unreadable reply"))) == Verdict.failed("unreadable reply")


def test_rounding_does_not_leave_the_range():
    assert judged(Says(Verdict.scored(1.0000000000000002))).ok
    assert judged(Says(Verdict.scored(-1e-17))).ok


class Slow(Rubric):
    """Never answers; notes that it was cancelled."""

    def __init__(self):
        self.cancelled = False

    async def judge(self, trajectory):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def test_a_missed_deadline_cancels_the_judge_and_fails():
    rubric = Slow()

    async def scenario():
        # Looked at inside the loop: when a loop ends, it cancels whatever is left.
        return await judge_safely(rubric, trajectory(), 0.05), rubric.cancelled

    verdict, cancelled = asyncio.run(scenario())
    assert verdict == Verdict.failed("Slow on trajectory episode-7: TimeoutError: no verdict within 0.05 s")
    assert cancelled


def test_a_judge_that_ignores_its_cancellation_cannot_hold_the_run(monkeypatch):
    monkeypatch.setattr(rubrics.deadline, "CANCEL_GRACE_S", 0.05)
    released = asyncio.Event()

    class Stubborn(Rubric):
        async def judge(self, trajectory):
            try:
                await released.wait()
            except asyncio.CancelledError:
                await released.wait()
            return Verdict.scored(1.0)

    async def scenario():
        started = time.perf_counter()
        verdict = await judge_safely(Stubborn(), trajectory(), 0.05)
        seconds = time.perf_counter() - started
        released.set()
        await asyncio.sleep(0.01)
        return verdict, seconds

    verdict, seconds = asyncio.run(scenario())
    assert not verdict.ok
    assert seconds < 2


def test_cancellation_of_the_caller_is_raised_and_reaches_the_judge():
    rubric = Slow()

    async def scenario():
        judging = asyncio.create_task(judge_safely(rubric, trajectory(), 30))
        await asyncio.sleep(0.01)
        judging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await judging
        assert rubric.cancelled

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [asyncio.CancelledError(), SystemExit(3)], ids=repr)
def test_what_a_judge_cancels_or_ends_inside_is_its_failure_and_nobodys_ctrl_c(end):
    verdict = judged(Says(end))
    assert verdict.value is None
    assert type(end).__name__ in verdict.failure


def test_a_failed_episode_is_not_judged():
    rubric = Says(Verdict.scored(1.0))
    assert "episode-7 failed before" in judged(rubric, stop_reason="failed").failure
    crash = Verdict.failed("environment crashed")
    assert judged(rubric, stop_reason="failed", verdict=crash) is crash


def test_environment_reward_is_the_sum_the_environment_gave():
    verdict = judged(EnvironmentReward(), env_reward=0.75, reward_components={"tool_used": 1.0})
    assert verdict == Verdict.scored(0.75, {"tool_used": 1.0})


def test_environment_reward_outside_its_range_fails():
    assert "outside reward_range (0, 1)" in judged(EnvironmentReward(), env_reward=-1.0).failure
    assert judged(EnvironmentReward(low=-1, high=1), env_reward=-1.0) == Verdict.scored(-1.0)
    assert not judged(EnvironmentReward(), env_reward=math.nan).ok


@pytest.mark.parametrize(("low", "high"), [(1, 0), (0, 0), (0, math.inf), (math.nan, 1)])
def test_environment_reward_refuses_a_range_that_is_none(low, high):
    with pytest.raises(ValueError, match="must be finite and not empty"):
        EnvironmentReward(low=low, high=high)
