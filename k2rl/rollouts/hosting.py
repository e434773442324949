"""Environments, hosted: built, called and closed so that none can block the loop, the run or its end.

Every call of plain (not `async`) plug-in code gets a daemon thread of its own. A pool would not do: as
many calls that hang as it has threads would stop all others, and CPython joins a pool's threads at exit.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from envs.base import TextEnv, maybe_await
from k2rl.diagnosis.stacks import innermost
from rubrics.deadline import MissedDeadlineError, within

T = TypeVar("T")

CLOSE_DEADLINE_S = 30.0
"""Seconds an environment gets to put away what it holds (a container, a session)."""

MAX_CALLS = 1000
"""Of plain code at once, each in a thread; further ones wait. One that missed its deadline counts no more."""

FRAMES_SHOWN = 4
"""Of an environment that is late."""

_calls: ContextVar[list[threading.Thread] | None] = ContextVar("calls", default=None)
"""The threads of what `hosted` has called; one that is alive at the deadline is what was waited for."""

_places_of: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

logger = logging.getLogger(__name__)


async def call(function: Callable[..., T | Awaitable[T]], *args: Any, **kwargs: Any) -> T:
    """Call plug-in code, async or not, without blocking the event loop.

    A cancelled call of plain code goes on in its thread, and nobody hears of its outcome.

    Raises:
        Exception: what it raised; a RuntimeError in place of what is no `Exception`.
    """
    if inspect.iscoroutinefunction(function):
        value: T = await function(*args, **kwargs)
        return value
    async with _places():
        found = await _in_thread(function, *args, **kwargs)
    return await maybe_await(found)


async def _closed(env: TextEnv) -> None:
    """Call `close()`, also where all places are taken by environments that hang."""
    await (call(env.close) if inspect.iscoroutinefunction(env.close) else _in_thread(env.close))


def _places() -> asyncio.Semaphore:
    loop = asyncio.get_running_loop()
    places = _places_of.get(loop)
    if places is None:
        places = _places_of[loop] = asyncio.Semaphore(MAX_CALLS)
    return places


async def _in_thread(
    function: Callable[..., T | Awaitable[T]], *args: Any, **kwargs: Any
) -> T | Awaitable[T]:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    outcome: list[Any] = [None, None]

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    def work() -> None:
        try:
            outcome[0] = function(*args, **kwargs)
        # Raised again below, where somebody waits for it.
        except BaseException as error:  # noqa: BLE001
            outcome[1] = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(end)

    name = getattr(function, "__qualname__", type(function).__name__)
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    calls = _calls.get()
    if calls is not None:
        calls.append(thread)
    await ended
    result, error = outcome
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    found: T | Awaitable[T] = result
    return found


async def hosted(
    make_env: Callable[[], TextEnv],
    use: Callable[[TextEnv], Coroutine[Any, Any, T]],
    deadline_s: float,
    excused_s: Callable[[], float] = lambda: 0.0,
) -> T:
    """Build an environment, use it, close it; building and use share `deadline_s`, closing has its own.

    What passes on the clock `excused_s` does not count.

    Raises:
        MissedDeadlineError: building and use took longer; its notes say where the environment stood.
        Exception: what the constructor, `use` or `close()` raised.
    """
    seat = _Seat(make_env)

    async def play() -> T:
        return await use(await call(seat.build))

    calls: list[threading.Thread] = []
    token = _calls.set(calls)
    try:
        result = await within(deadline_s, play(), excused_s)
    except BaseException as first:
        if isinstance(first, MissedDeadlineError) and calls and calls[-1].is_alive():
            first.add_note(f"{calls[-1].name} stands at {innermost(calls[-1], FRAMES_SHOWN)}")
        try:
            await seat.close()
        # The first error is the one to report.
        except Exception as second:
            logger.warning("close() of an environment failed after %r", first, exc_info=second)
        raise
    finally:
        _calls.reset(token)
    await seat.close()
    return result


class _Seat:
    """One environment, closed once and for all: also one that is finished when nobody wants it any more."""

    def __init__(self, make_env: Callable[[], TextEnv]) -> None:
        self._make_env = make_env
        self._lock = threading.Lock()
        self._env: TextEnv | None = None
        self._closed = False

    def build(self) -> TextEnv:
        env = self._make_env()
        with self._lock:
            self._env = env
            too_late = self._closed
        if too_late:
            try:
                env.close()
            # Nobody waits for this thread any more: the log is all there is to tell.
            except Exception as error:
                logger.warning("close() of an environment built too late failed", exc_info=error)
        return env

    async def close(self) -> None:
        """Raises:
        RuntimeError: `close()` raised or did not end in time.
        """
        with self._lock:
            env, self._closed = self._env, True
        if env is None:
            return
        try:
            await within(CLOSE_DEADLINE_S, _closed(env))
        except MissedDeadlineError as error:
            raise RuntimeError(f"close(): {error}") from error
        except Exception as error:
            raise RuntimeError(f"close(): {type(error).__name__}: {error}") from error
