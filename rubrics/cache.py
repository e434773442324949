"""Verdicts kept by the content that was judged. Failures are never kept."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import msgspec

from k2rl.types import Trajectory, Verdict
from rubrics.base import Rubric
from rubrics.models import asks_run_model


class VerdictCache(Protocol):
    """Where verdicts are kept; safe to use from several threads."""

    def get(self, key: str) -> Verdict | None:
        """The verdict kept under a key, if there is one."""

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict; one that failed is not kept."""


def content_key(rubric: Rubric, trajectory: Trajectory) -> str | None:
    """The key of a judgement: a hash of all that it depends on; None if the rubric's are not to be kept."""
    content = None if asks_run_model(rubric) else rubric.content(trajectory)
    if content is None:
        return None
    encoded = msgspec.json.encode([rubric.identity, content], order="sorted")
    return hashlib.sha256(encoded).hexdigest()


class MemoryCache:
    """The last `most` verdicts, in this process."""

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._kept: OrderedDict[str, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Verdict | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        if not verdict.ok:
            return
        with self._lock:
            self._kept[key] = verdict
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)


class SqliteCache:
    """Verdicts in a file, which several processes may share."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, verdict BLOB)")

    def get(self, key: str) -> Verdict | None:
        with self._lock:
            row = self._database.execute("SELECT verdict FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Verdict)

    def put(self, key: str, verdict: Verdict) -> None:
        if not verdict.ok:
            return
        with self._lock:
            self._database.execute(
                "INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, msgspec.json.encode(verdict))
            )

    def close(self) -> None:
        with self._lock:
            self._database.close()
