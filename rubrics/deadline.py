"""Wait for code that others wrote: its end, its deadline or our cancellation, told apart."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_GRACE_S = 1.0
"""Seconds that cancelled work gets to clean up; after that it is left behind."""


class MissedDeadlineError(Exception):
    """Work was not done in time. Not a TimeoutError, which the work itself may raise."""


async def within(deadline_s: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; what goes wrong in it is an ordinary exception, whatever it raised.

    Not `asyncio.timeout`: work that ignores its cancellation must not hold the caller.

    Raises:
        MissedDeadlineError: it was not done within `deadline_s` seconds, and was cancelled.
        Exception: what the work raised. Where something inside it was cancelled, or it tried to end
            the process, a RuntimeError that says so: neither is the user's Ctrl-C.
        asyncio.CancelledError: the caller was cancelled; the work is cancelled with it.
    """
    task = asyncio.create_task(_contained(work))
    try:
        await asyncio.wait({task}, timeout=deadline_s)
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
