"""What a store of episodes promises, whatever keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import xxhash

from k2rl.errors import ConfigError
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.types import Trajectory, Verdict


class Counts(msgspec.Struct, frozen=True):
    """Episodes by where they stand."""

    #: Asked for, and with nobody; those whose lease ran out are among them.
    waiting: int
    #: With a rollout process.
    leased: int
    #: Over, not learned from; those that a trainer has taken are among them.
    finished: int
    #: Learned from.
    learned: int


class TrajectoryStore(Protocol):
    """Episodes by their ids, each on one way: waiting, leased, finished, taken, learned.

    Any number of processes may share a store. Every call is one transaction: it has happened whole or not at
    all, whoever is killed. An episode is finished once and learned from once: what comes later for its id is
    refused. Leases run out: the episodes of a process that died are given to another.

    Every method raises `RunError` if the store cannot be reached.
    """

    def begin(self, source: str) -> int:
        """Say what the episodes are of (model, settings, weights); those of another source are forgotten.

        Returns:
            How many were. Verdicts stay.
        """
        ...

    def add(self, attempts: Sequence[Attempt]) -> int:
        """Ask for episodes, in this order; returns how many were not known yet."""
        ...

    def lease(self, count: int, holder: str, seconds: float) -> list[Episode]:
        """Up to `count` waiting episodes, parked ones first, for `holder` alone while the lease lasts."""
        ...

    def renew(self, holder: str, seconds: float) -> int:
        """Let all leases of `holder` last for so long from now; returns how many it has."""
        ...

    def release(self, holder: str) -> int:
        """End all leases of `holder`, of unfinished and finished episodes alike; returns how many."""
        ...

    def park(self, episodes: Sequence[Episode], holder: str, seconds: float) -> None:
        """Keep how far leased episodes have come.

        `holder` has them for `seconds` from now, with 0 no longer. What others hold by now stays theirs.
        """
        ...

    def finish(self, trajectories: Sequence[Trajectory]) -> int:
        """Keep finished episodes, each id once, asked for or not; returns how many were new."""
        ...

    def take(self, count: int, holder: str, seconds: float) -> list[Trajectory]:
        """Up to `count` finished episodes, the oldest first, for `holder` alone while the lease lasts."""
        ...

    def ack(self, ids: Sequence[str], holder: str) -> list[str]:
        """Note that `holder` has learned from what it took, which then is no more than an id.

        Returns:
            Those that it may count as its own; the others had gone to somebody else.
        """
        ...

    def drop(self, ids: Sequence[str]) -> None:
        """Forget episodes that are not wanted any more."""
        ...

    def counts(self) -> Counts: ...

    def verdict(self, key: str) -> Verdict | None:
        """The verdict on what has this content (`verdict_key`), if one was kept."""
        ...

    def keep_verdict(self, key: str, verdict: Verdict) -> None:
        """Keep a score. A failure is no verdict on the content: it is not kept."""
        ...

    def close(self) -> None: ...


def verdict_key(rubric: str, trajectory: Trajectory) -> str:
    """A digest of all that a judge sees; `rubric` names it with its settings."""
    seen = (
        *(rubric, trajectory.task, trajectory.messages, trajectory.stop_reason),
        *(trajectory.env_reward, trajectory.reward_components),
    )
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(seen, order="deterministic"))


def open_store(url: str, name: str, deadline_s: float) -> TrajectoryStore:
    """The store at `url`: a file's path, `:memory:`, or `redis://host:port/0`.

    Args:
        url: says which.
        name: of the run, whose episodes are kept apart from others' in the same Redis.
        deadline_s: how long to try to reach it.

    Raises:
        ConfigError: it is of no use, with the reason.
    """
    if url.startswith(("redis://", "rediss://", "unix://")):
        from k2rl.rollouts.store.redis import RedisStore

        return RedisStore(url, name, deadline_s)
    if "://" in url:
        raise ConfigError(f"rollout.store={url} must be redis://, rediss:// or unix://; null is a file")
    from k2rl.rollouts.store.sqlite import SQLiteStore

    return SQLiteStore(Path(url), deadline_s)
