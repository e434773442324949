"""Seconds of a call, and numbers of all ranks as one."""

from __future__ import annotations

import time
from collections.abc import Iterable


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def added(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sum of each number over ranks."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def longest(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The largest of each number over ranks."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = max(total.get(name, 0.0), value)
    return total
