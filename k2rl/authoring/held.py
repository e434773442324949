"""What this process holds: threads, tasks, descriptors, children. What grows with each episode is a leak."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from pathlib import Path

SETTLE_S = 10.0
"""Seconds that what is being put away gets to go before it counts as leaked."""
LOOK_S = 0.05


async def settled(wanted: dict[str, int] | None = None) -> dict[str, int]:
    """What is held, once it is no more than wanted or has had its time; without a wish, after a moment."""
    deadline = time.monotonic() + (0.5 if wanted is None else SETTLE_S)
    while True:
        gc.collect()
        held = {"asyncio tasks": len(asyncio.all_tasks()), **_of_the_process()}
        if wanted is not None and all(held[what] <= wanted[what] for what in held):
            return held
        if time.monotonic() >= deadline:
            return held
        await asyncio.sleep(LOOK_S)


def _of_the_process() -> dict[str, int]:
    children = Path("/proc/self/task").glob("*/children")
    return {
        "threads": threading.active_count(),
        "file descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - one call, no objects
        "child processes": sum(len(_text(path).split()) for path in children),
    }


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a thread that has just ended
        return ""
