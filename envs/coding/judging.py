"""One code judge for all environments of an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from rubrics.code import CodeJudge
from sandboxes.errors import SandboxError

LOG = logging.getLogger(__name__)
_JUDGES: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, CodeJudge]] = WeakKeyDictionary()


def shared_judge(sandbox: str) -> CodeJudge:
    """The running loop's judge on this backend: its sandboxes are opened once for all episodes.

    Raises:
        SandboxUnavailableError: the backend cannot run here.
    """
    judges = _JUDGES.setdefault(asyncio.get_running_loop(), {})
    if sandbox not in judges:
        judges[sandbox] = CodeJudge(sandbox)
    return judges[sandbox]


async def close_judges() -> None:
    """End the judges of the running loop."""
    for name, judge in _JUDGES.pop(asyncio.get_running_loop(), {}).items():
        try:
            await judge.close()
        except SandboxError as error:
            # What was judged stays so; what is left ends with this process, or is removed by the next one.
            LOG.warning("closing the %s sandboxes: %s", name, error)


@asynccontextmanager
async def judges_end() -> AsyncIterator[None]:
    """Around all that plays environments in an event loop: what they share ends with it."""
    try:
        yield
    finally:
        await close_judges()
