"""One code judge for all environments of an event loop."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from rubrics.code import CodeJudge

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
    for judge in _JUDGES.pop(asyncio.get_running_loop(), {}).values():
        await judge.close()
