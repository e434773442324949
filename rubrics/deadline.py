"""Wait for code that others wrote: its end, its deadline or our cancellation, told apart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_GRACE_S = 1.0
"""Seconds that cancelled work gets to clean up; after that it is left behind."""


class MissedDeadlineError(Exception):
    """Work was not done in time. Not a TimeoutError, which the work itself may raise."""


async def within(
    deadline_s: float, work: Coroutine[Any, Any, T], excused_s: Callable[[], float] = lambda: 0.0
) -> T:
    """The result of `work`; what goes wrong in it is an ordinary exception, whatever it raised.

    Not `asyncio.timeout`: work that ignores its cancellation must not hold the caller.

    Args:
        deadline_s: seconds for it.
        work: to be awaited.
        excused_s: a clock of the time that does not count against it.

    Raises:
        MissedDeadlineError: it was not done within `deadline_s` seconds, and was cancelled.
        Exception: what the work raised. Where something inside it was cancelled, or it tried to end
            the process, a RuntimeError that says so: neither is the user's Ctrl-C.
        asyncio.CancelledError: the caller was cancelled; the work is cancelled with it.
    """
    task = asyncio.create_task(_contained(work))
    # Cancelled before it began (by the end of the loop, say), it leaves `work` to be put away.
    task.add_done_callback(lambda task: work.close() if task.cancelled() else None)
    began, excused = time.monotonic(), excused_s()
    try:
        while not task.done():
            left = deadline_s + excused_s() - excused - (time.monotonic() - began)
            if left <= 0:
                break
            await asyncio.wait({task}, timeout=left)
        in_time = task.done()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
    if not in_time:
        if task.done() and not task.cancelled():
            task.exception()  # looked at: asyncio reports an exception that nobody asked for
        raise MissedDeadlineError(f"not done within {deadline_s:g} s")
    if task.cancelled():
        raise RuntimeError("CancelledError: something that it waited for was cancelled")
    return task.result()


async def _contained(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    except SystemExit as error:  # asyncio would let it through to the end of the process
        raise RuntimeError(f"SystemExit: {error}") from error
