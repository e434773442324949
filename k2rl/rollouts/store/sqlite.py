"""Episodes in an SQLite file: the default, nothing to install and nothing to start."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from k2rl.errors import RunError
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.rollouts.store.base import Counts
from k2rl.types import Trajectory, Verdict

# A waiting or finished episode may be leased, to who plays it or to who learns from it.
WAITING, FINISHED, LEARNED = range(3)

SCHEMA = """
CREATE TABLE IF NOT EXISTS about (source TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS episodes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state INTEGER NOT NULL,
    parked INTEGER NOT NULL DEFAULT 0,
    holder TEXT NOT NULL DEFAULT '',
    until REAL NOT NULL DEFAULT 0,
    content BLOB
);
CREATE INDEX IF NOT EXISTS in_turn ON episodes (state, parked DESC, number);
CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, content BLOB NOT NULL) WITHOUT ROWID;
"""


class SQLiteStore:
    """A `TrajectoryStore` in a file that processes of one machine may share.

    It is in WAL mode: a killed process loses nothing that was answered. A machine that loses its power may
    lose what came last, and nothing else.
    """

    def __init__(self, path: Path, deadline_s: float = 30.0, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            path: is made if it is not there; `:memory:` is kept by this object alone.
            deadline_s: how long to wait for other processes' transactions.
            clock: seconds that all processes agree on.
        """
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        if str(path) != ":memory:":
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._db = sqlite3.connect(
                path, timeout=deadline_s, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(SCHEMA)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RunError(f"the store of episodes {self._path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def begin(self, source: str) -> int:
        with self._transaction() as db:
            row = db.execute("SELECT source FROM about").fetchone()
            if row == (source,):
                return 0
            forgotten = db.execute("DELETE FROM episodes WHERE state != ?", (LEARNED,)).rowcount
            db.execute("DELETE FROM episodes")
            db.execute("DELETE FROM about")
            db.execute("INSERT INTO about VALUES (?)", (source,))
            return forgotten

    def add(self, attempts: Sequence[Attempt]) -> int:
        rows = [(a.id, WAITING, msgspec.msgpack.encode(Episode(a))) for a in attempts]
        with self._transaction() as db:
            statement = "INSERT OR IGNORE INTO episodes (id, state, content) VALUES (?, ?, ?)"
            return db.executemany(statement, rows).rowcount

    def lease(self, count: int, holder: str, seconds: float) -> list[Episode]:
        order = "parked DESC, number"
        return [
            msgspec.msgpack.decode(row, type=Episode)
            for row in self._leased(WAITING, order, count, holder, seconds)
        ]

    def take(self, count: int, holder: str, seconds: float) -> list[Trajectory]:
        rows = self._leased(FINISHED, "number", count, holder, seconds)
        return [msgspec.msgpack.decode(row, type=Trajectory) for row in rows]

    def _leased(self, state: int, order: str, count: int, holder: str, seconds: float) -> list[bytes]:
        now = self._clock()
        with self._transaction() as db:
            rows = db.execute(
                "SELECT number, content FROM episodes WHERE state = ? AND until <= ? "
                f"ORDER BY {order} LIMIT ?",
                (state, now, count),
            ).fetchall()
            db.executemany(
                "UPDATE episodes SET holder = ?, until = ? WHERE number = ?",
                [(holder, now + seconds, number) for number, _ in rows],
            )
        return [content for _, content in rows]

    def renew(self, holder: str, seconds: float) -> int:
        now = self._clock()
        with self._transaction() as db:
            statement = "UPDATE episodes SET until = ? WHERE holder = ? AND until > ?"
            return db.execute(statement, (now + seconds, holder, now)).rowcount

    def release(self, holder: str) -> int:
        with self._transaction() as db:
            statement = "UPDATE episodes SET holder = '', until = 0 WHERE holder = ? AND state != ?"
            return db.execute(statement, (holder, LEARNED)).rowcount

    def park(self, episodes: Sequence[Episode], holder: str, seconds: float) -> None:
        then = self._clock() + seconds
        owner, until = (holder, then) if seconds else ("", 0.0)
        rows = [
            (e.trajectory is not None, msgspec.msgpack.encode(e), owner, until, e.attempt.id, holder)
            for e in episodes
        ]
        with self._transaction() as db:
            db.executemany(
                "UPDATE episodes SET parked = ?, content = ?, holder = ?, until = ? "
                f"WHERE id = ? AND holder = ? AND state = {WAITING}",
                rows,
            )

    def finish(self, trajectories: Sequence[Trajectory]) -> int:
        rows = [(t.id, FINISHED, msgspec.msgpack.encode(t)) for t in trajectories]
        with self._transaction() as db:
            return db.executemany(
                "INSERT INTO episodes (id, state, content) VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE "
                "SET state = excluded.state, content = excluded.content, parked = 0, holder = '', until = 0 "
                f"WHERE state = {WAITING}",
                rows,
            ).rowcount

    def ack(self, ids: Sequence[str], holder: str) -> list[str]:
        with self._transaction() as db:
            db.executemany(
                f"UPDATE episodes SET state = {LEARNED}, content = NULL, until = 0 "
                f"WHERE id = ? AND holder = ? AND state = {FINISHED}",
                [(id, holder) for id in ids],
            )
            found = f"SELECT 1 FROM episodes WHERE id = ? AND holder = ? AND state = {LEARNED}"
            return [id for id in ids if db.execute(found, (id, holder)).fetchone()]

    def drop(self, ids: Sequence[str]) -> None:
        with self._transaction() as db:
            statement = f"DELETE FROM episodes WHERE id = ? AND state != {LEARNED}"
            db.executemany(statement, [(id,) for id in ids])

    def counts(self) -> Counts:
        now = self._clock()
        with self._transaction() as db:
            found = db.execute(
                "SELECT state, state = ? AND until > ?, count(*) FROM episodes GROUP BY 1, 2", (WAITING, now)
            ).fetchall()
        by = {(state, bool(leased)): count for state, leased, count in found}
        return Counts(
            by.get((WAITING, False), 0),
            by.get((WAITING, True), 0),
            by.get((FINISHED, False), 0),
            by.get((LEARNED, False), 0),
        )

    def verdict(self, key: str) -> Verdict | None:
        with self._lock, self._told():
            row = self._db.execute("SELECT content FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else msgspec.msgpack.decode(row[0], type=Verdict)

    def keep_verdict(self, key: str, verdict: Verdict) -> None:
        if verdict.ok:
            with self._transaction() as db:
                row = (key, msgspec.msgpack.encode(verdict))
                db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", row)

    def close(self) -> None:
        with self._lock:
            self._db.close()
