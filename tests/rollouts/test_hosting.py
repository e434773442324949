"""Environments that hang: the loop goes on, their episodes fail, the process ends."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from envs.calculator import CalculatorEnv
from k2rl.rollouts.hosting import call, hosted
from rubrics.deadline import MissedDeadlineError, within

HANGING = """
import asyncio, threading
from envs.calculator import CalculatorEnv
from k2rl.rollouts.hosting import call, hosted
from rubrics.deadline import MissedDeadlineError

class Hanging(CalculatorEnv):
    def step(self, action):
        threading.Event().wait()

async def episode(env):
    await call(env.reset)
    await call(env.step, "7")

async def main():
    ends = await asyncio.gather(
        *(hosted(Hanging, episode, 0.2) for _ in range(100)), return_exceptions=True
    )
    assert all(isinstance(end, MissedDeadlineError) for end in ends), ends
    print("over:", await hosted(CalculatorEnv, one_turn, 20))

async def one_turn(env):
    await call(env.reset)
    return (await call(env.step, "7"))[2]

asyncio.run(main())
"""


def test_a_hundred_hung_steps_stop_neither_the_others_nor_the_end_of_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["over:", "True"]


class Noted(CalculatorEnv):
    """Notes what is asked of it; its constructor may wait for `gate`."""

    closed = 0
    gate: threading.Event | None = None

    def __init__(self) -> None:
        if self.gate is not None:
            self.gate.wait()
        super().__init__()

    def close(self) -> None:
        type(self).closed += 1


async def _nothing(env: Any) -> str:
    return "used"


def test_an_environment_is_closed_after_use_and_after_an_error() -> None:
    class Env(Noted):
        pass

    async def broken(env: Any) -> None:
        raise KeyError("step")

    assert asyncio.run(hosted(Env, _nothing, 5)) == "used"
    with pytest.raises(KeyError):
        asyncio.run(hosted(Env, broken, 5))
    assert Env.closed == 2


def test_an_environment_that_is_built_too_late_is_closed_too() -> None:
    closed = threading.Event()

    class Env(Noted):
        gate = threading.Event()

        def close(self) -> None:
            closed.set()

    with pytest.raises(MissedDeadlineError):
        asyncio.run(hosted(Env, _nothing, 0.05))
    assert not closed.is_set()
    Env.gate.set()
    assert closed.wait(20)


class ClosedElsewhere(Noted):
    """Its close gives something to be awaited, without being `async` itself."""

    def close(self) -> Any:
        async def later() -> None:
            await asyncio.sleep(0)
            ClosedElsewhere.closed += 1

        return later()


def test_what_a_close_gives_is_awaited() -> None:
    asyncio.run(hosted(ClosedElsewhere, _nothing, 20))
    assert ClosedElsewhere.closed == 1


def test_a_close_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2rl.rollouts.hosting.CLOSE_DEADLINE_S", 0.05)

    class Env(CalculatorEnv):
        def close(self) -> None:
            threading.Event().wait()

    with pytest.raises(RuntimeError, match=r"close\(\): not done within"):
        asyncio.run(hosted(Env, _nothing, 5))


def test_call_takes_plain_and_async_code_and_passes_what_they_raise() -> None:
    async def later(value: int) -> int:
        return value

    def wrong() -> None:
        raise OSError("gone")

    async def scenario() -> None:
        assert await call(later, 1) == 1
        assert await call(lambda: later(2)) == 2
        assert await call(max, 3, 2) == 3
        with pytest.raises(OSError, match="gone"):
            await call(wrong)

    asyncio.run(scenario())


def test_work_that_is_cancelled_before_it_begins_is_put_away() -> None:
    async def never() -> None:
        raise AssertionError("it began")

    async def scenario(work: Coroutine[Any, Any, None]) -> None:
        waiting = asyncio.ensure_future(within(60, work))
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:  # as at the end of a loop
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    work = never()
    asyncio.run(scenario(work))
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED
