"""Episodes in Redis (7 or newer), for rollout processes on many machines; every change is one script there.

Keys of a run begin with `k2rl:{name}:`, and so are on one node of a cluster. With `appendonly yes` a Redis
that is killed and started again has all that it answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from k2rl.errors import ConfigError, RunError
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.rollouts.store.base import Counts
from k2rl.types import Trajectory, Verdict

RETRY_S = 0.1
#: Episodes in one call of a script: others get their turn in between, and Lua's stack has an end.
BATCH = 500

T = TypeVar("T")

_ENCODER = msgspec.msgpack.Encoder()
_EPISODE = msgspec.msgpack.Decoder(Episode)
_TRAJECTORY = msgspec.msgpack.Decoder(Trajectory)
_SCRIPTS = (Path(__file__).parent / "redis.lua").read_text()
_NAMES = ("begin", "add", "lease", "renew", "release", "park", "finish", "take", "ack", "drop", "counts")


class RedisStore:
    """A `TrajectoryStore` in Redis.

    A call that finds Redis gone tries again until `deadline_s`; every script may be repeated safely, if its
    answer was lost (what an unheard `lease` or `take` gave out comes back when the lease has run out).
    """

    def __init__(self, url: str, name: str, deadline_s: float = 30.0) -> None:
        """
        Args:
            url: `redis://[user:password@]host:port/database`, `rediss://…` or `unix://path`.
            name: of the run.
            deadline_s: seconds in which a call must succeed.

        Raises:
            ConfigError: there is no Redis, or an old one.
        """
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        self._where = f"{parts.scheme}://{parts.hostname or parts.path}{port}"  # without its password
        self._prefix = f"k2rl:{{{name}}}:"
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=deadline_s,
                socket_connect_timeout=deadline_s,
                retry=Retry(ConstantBackoff(RETRY_S), max(int(deadline_s / RETRY_S), 1)),
            )
            version = str(self._redis.info("server")["redis_version"])
        except (redis.RedisError, ValueError) as error:
            raise ConfigError(f"rollout.store={self._where}: no Redis answers there: {error}") from error
        if int(version.partition(".")[0]) < 7:
            raise ConfigError(f"rollout.store={self._where} is Redis {version}; 7 or newer is needed")
        self._scripts = {
            script: self._redis.register_script(f"{_SCRIPTS}\nreturn {script}()") for script in _NAMES
        }

    def _call(self, script: str, *arguments: str | bytes | float) -> Any:
        try:
            return self._scripts[script](keys=[self._prefix], args=arguments)
        except redis.RedisError as error:
            raise RunError(f"the store of episodes {self._where}: {error}") from error

    def begin(self, source: str) -> int:
        return int(self._call("begin", source))

    def add(self, attempts: Sequence[Attempt]) -> int:
        return sum(map(int, self._put("add", [(a.id, Episode(a)) for a in attempts])))

    def finish(self, trajectories: Sequence[Trajectory]) -> int:
        return sum(map(int, self._put("finish", [(t.id, t) for t in trajectories])))

    def _put(self, script: str, things: Sequence[tuple[Any, ...]], *first: str | float) -> list[Any]:
        """Call a script with things, each after the words that belong to it; the answers, one a batch."""
        answers: list[Any] = []
        for start in range(0, len(things), BATCH):
            words: list[str | bytes | float] = [*first]
            for *said, thing in things[start : start + BATCH]:
                words += (*said, _ENCODER.encode(thing))
            answers.append(self._call(script, *words))
        return answers

    def lease(self, count: int, holder: str, seconds: float) -> list[Episode]:
        return self._given("lease", _EPISODE, count, holder, seconds)

    def take(self, count: int, holder: str, seconds: float) -> list[Trajectory]:
        return self._given("take", _TRAJECTORY, count, holder, seconds)

    def _given(
        self, script: str, decoder: msgspec.msgpack.Decoder[T], count: int, holder: str, seconds: float
    ) -> list[T]:
        found: list[T] = []
        while len(found) < count:
            given = self._call(script, min(count - len(found), BATCH), holder, seconds)
            if not given:
                break
            found += map(decoder.decode, given)
        return found

    def renew(self, holder: str, seconds: float) -> int:
        return int(self._call("renew", holder, seconds))

    def release(self, holder: str) -> int:
        return int(self._call("release", holder))

    def park(self, episodes: Sequence[Episode], holder: str, seconds: float) -> None:
        things = [(e.attempt.id, "1" if e.trajectory is not None else "", e) for e in episodes]
        self._put("park", things, holder, seconds)

    def ack(self, ids: Sequence[str], holder: str) -> list[str]:
        acked: list[str] = []
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            others = set(self._call("ack", holder, *batch))
            acked += [id for place, id in enumerate(batch, start=1) if place not in others]
        return acked

    def drop(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), BATCH):
            self._call("drop", *ids[start : start + BATCH])

    def counts(self) -> Counts:
        return Counts(*map(int, self._call("counts")))

    def verdict(self, key: str) -> Verdict | None:
        try:
            found: Any = self._redis.hget(self._prefix + "verdicts", key)
        except redis.RedisError as error:
            raise RunError(f"the store of episodes {self._where}: {error}") from error
        return None if found is None else msgspec.msgpack.decode(found, type=Verdict)

    def keep_verdict(self, key: str, verdict: Verdict) -> None:
        if not verdict.ok:
            return
        try:
            self._redis.hset(self._prefix + "verdicts", key, msgspec.msgpack.encode(verdict))
        except redis.RedisError as error:
            raise RunError(f"the store of episodes {self._where}: {error}") from error

    def close(self) -> None:
        self._redis.close()
