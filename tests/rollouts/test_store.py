"""The store's promises, the same for SQLite and Redis: every episode once, whoever is killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import Generation
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.rollouts.store.base import Counts, TrajectoryStore, open_store, verdict_key
from k2rl.types import Message, Segment, Task, Trajectory, Verdict
from tests.redis_server import RedisServer

TASK = Task("task", "calculator", "add", "train", 7, {"numbers": [1, 2]})
LONG = 3600.0
_names = itertools.count()


@pytest.fixture(params=["sqlite", "redis"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], TrajectoryStore]]:
    """Opens the test's store, as another process would."""
    opened: list[TrajectoryStore] = []
    name = f"run{next(_names)}"
    url = (
        str(tmp_path / "episodes.sqlite3")
        if request.param == "sqlite"
        else request.getfixturevalue("redis_server").url
    )

    def again() -> TrajectoryStore:
        opened.append(open_store(url, name, 30.0))
        return opened[-1]

    again.url, again.name = url, name  # type: ignore[attr-defined]
    yield again
    for store in opened:
        store.close()


@pytest.fixture
def store(reopen: Callable[[], TrajectoryStore]) -> TrajectoryStore:
    return reopen()


def attempts(count: int, start: int = 0) -> list[Attempt]:
    return [Attempt(f"a{k}", f"g{k // 4}", TASK, 1.0, k) for k in range(start, start + count)]


def trajectory(number: int, text: str = "3\x00") -> Trajectory:
    return Trajectory(
        f"a{number}",
        f"g{number // 4}",
        TASK,
        1.0,
        [Segment((1, 2), False), Segment((3, 4), True, (-0.1, -1e-17 - 1 / 3), 5)],
        [Message("user", "1 + 2 ≠ 4?"), Message("assistant", text)],
        verdict=Verdict.scored(1.0, {"correct": 1.0}),
    )


def ids(episodes: list[Episode] | list[Trajectory]) -> list[str]:
    return [e.attempt.id if isinstance(e, Episode) else e.id for e in episodes]


def test_an_episode_s_way_from_being_asked_for_to_being_learned_from(store: TrajectoryStore) -> None:
    assert store.add(attempts(3)) == 3
    assert store.add(attempts(4)) == 1, "three are known"
    leased = store.lease(2, "one", LONG)
    assert [episode.attempt for episode in leased] == attempts(2), "in the order of asking, unchanged"
    assert ids(store.lease(9, "two", LONG)) == ["a2", "a3"]
    assert store.counts() == Counts(0, 4, 0, 0)
    assert store.finish([trajectory(1), trajectory(0)]) == 2
    taken = store.take(9, "trainer", LONG)
    assert taken == [trajectory(0), trajectory(1)], "the very numbers, the oldest first"
    assert store.take(9, "trainer", LONG) == []
    assert store.ack(["a0", "a1", "a2"], "trainer") == ["a0", "a1"]
    assert store.counts() == Counts(0, 2, 0, 2)


def test_nothing_is_finished_or_learned_twice(store: TrajectoryStore) -> None:
    store.add(attempts(1))
    store.lease(1, "slow", 0)
    store.lease(1, "quick", LONG)
    assert store.finish([trajectory(0, "quick")]) == 1
    assert store.finish([trajectory(0, "slow")]) == 0, "who lost its lease is too late"
    assert store.take(1, "dead trainer", 0)[0].messages[-1].content == "quick"
    assert ids(store.take(1, "trainer", LONG)) == ["a0"], "its lease was over"
    assert store.ack(["a0"], "dead trainer") == []
    assert store.ack(["a0"], "trainer") == ["a0"]
    assert store.ack(["a0"], "trainer") == ["a0"], "an answer may get lost"
    assert store.finish([trajectory(0, "ghost")]) == 0
    assert store.add(attempts(1)) == 0
    assert store.lease(1, "x", LONG) == []
    assert store.take(1, "x", LONG) == []


def test_leases_end_and_are_renewed_and_released(store: TrajectoryStore) -> None:
    store.add(attempts(4))
    store.lease(2, "alive", LONG)
    store.lease(2, "dead", 0)
    assert store.renew("alive", LONG) == 2
    assert store.renew("dead", LONG) == 0, "what is over is over"
    assert ids(store.lease(9, "alive", LONG)) == ["a2", "a3"]
    store.finish([trajectory(0)])
    store.take(1, "alive", LONG)
    assert store.release("alive") == 4
    assert ids(store.lease(9, "other", LONG)) == ["a1", "a2", "a3"]
    assert ids(store.take(9, "other", LONG)) == ["a0"]


def test_parked_episodes_come_first_and_as_they_were(reopen: Callable[[], TrajectoryStore]) -> None:
    store = reopen()
    store.add(attempts(4))
    _, _, third, fourth = store.lease(4, "one", LONG)
    third.trajectory, third.actions = trajectory(2), ["1 + 2"]
    third.turn = Generation((5,), (-0.25,), ((0, 7),), "interrupted")
    third.snapshot = b"\x00state"
    store.park([third], "one", 0)
    store.park([fourth], "one", LONG)
    assert ids(reopen().lease(9, "two", LONG)) == ["a2"], "the others are held"
    fourth.actions = ["late"]
    third.actions = ["not its own any more"]
    store.park([third, fourth], "one", 0)
    store.release("two")
    assert [(e.attempt.id, e.actions) for e in store.lease(9, "two", LONG)] == [
        ("a2", ["1 + 2"]),
        ("a3", ["late"]),
    ]
    store.release("two")
    (again, _) = store.lease(9, "two", LONG)
    assert (again.turn, again.snapshot, again.trajectory) == (third.turn, third.snapshot, third.trajectory)


def test_what_was_dropped_may_be_asked_for_again(store: TrajectoryStore) -> None:
    store.add(attempts(3))
    store.finish([trajectory(0), trajectory(1)])
    store.take(1, "trainer", LONG)
    store.ack(["a0"], "trainer")
    store.drop(["a0", "a1", "a2"])
    assert store.counts() == Counts(0, 0, 0, 1)
    assert store.add(attempts(3)) == 2
    assert ids(store.lease(9, "x", LONG)) == ["a1", "a2"]


def test_episodes_of_another_source_are_forgotten_and_verdicts_are_not(store: TrajectoryStore) -> None:
    store.begin("weights 1")
    store.add(attempts(2))
    store.finish([trajectory(0)])
    store.keep_verdict("key", Verdict.scored(0.5, {"style": 0.25}))
    assert store.begin("weights 1") == 0
    assert store.counts() == Counts(1, 0, 1, 0)
    assert store.begin("weights 2") == 2
    assert store.counts() == Counts(0, 0, 0, 0)
    assert store.verdict("key") == Verdict.scored(0.5, {"style": 0.25})


def test_failures_are_never_kept_as_verdicts(store: TrajectoryStore) -> None:
    assert store.verdict("key") is None
    store.keep_verdict("key", Verdict.failed("the judge is away"))
    assert store.verdict("key") is None
    store.keep_verdict("key", Verdict.scored(0.0))
    assert store.verdict("key") == Verdict.scored(0.0)


def test_a_verdict_s_key_is_what_a_judge_sees() -> None:
    key = verdict_key("rubric", trajectory(0))
    assert verdict_key("rubric", trajectory(1)) == key, "the same words"
    assert verdict_key("rubric", trajectory(0, "4")) != key
    assert verdict_key("another", trajectory(0)) != key
    other = trajectory(0)
    other.task = Task("task", "calculator", "add", "train", 7, {"numbers": [1, 3]})
    assert verdict_key("rubric", other) != key


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "lease", "dead lease", "finish", "park", "take", "dead take", "ack", "drop"]),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(operations)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_whatever_happens_an_episode_is_in_one_place_and_learned_once(
    reopen: Callable[[], TrajectoryStore], done: list[tuple[str, int]]
) -> None:
    store = reopen()
    store.begin(f"example {next(_names)}")
    known: set[str] = set()
    learned: list[str] = []
    for what, n in done:
        if what == "add":
            store.add(attempts(2, n))
            known |= {f"a{n}", f"a{n + 1}"}
        elif what in ("lease", "dead lease"):
            store.lease(n, "player", LONG if what == "lease" else 0)
        elif what == "finish":
            store.finish([trajectory(n)])
            known.add(f"a{n}")
        elif what == "park":
            store.park([Episode(attempts(1, n)[0], trajectory(n))], "player", n % 2)
        elif what in ("take", "dead take"):
            store.take(n, "trainer", LONG if what == "take" else 0)
        elif what == "ack":
            new = store.counts().learned
            store.ack([f"a{n}"], "trainer")
            learned += [f"a{n}"] * (store.counts().learned - new)
        else:
            store.drop([f"a{n}"])
            known -= {f"a{n}"} - set(learned)
        counts = store.counts()
        assert counts.waiting + counts.leased + counts.finished + counts.learned == len(known)
    assert len(set(learned)) == len(learned)
    store.close()


WRITER = """
import sys
from k2rl.rollouts.store.base import open_store
from tests.rollouts.test_store import trajectory

url, name = sys.argv[1:]
store = open_store(url, name, 30.0)
episodes = store.lease(200, "doomed", {lease})
for number, episode in enumerate(episodes):
    store.finish([trajectory(int(episode.attempt.id[1:]))])
    print(number, flush=True)
"""


def test_a_killed_rollout_process_with_200_episodes_loses_and_doubles_none(
    reopen: Callable[[], TrajectoryStore],
) -> None:
    store = reopen()
    store.add(attempts(300))
    where = [reopen.url, reopen.name]  # type: ignore[attr-defined]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER.format(lease=0.5), *where], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(50):
        assert writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    learned: list[str] = []
    while len(learned) < 300:
        for episode in store.lease(64, "survivor", LONG):  # those of the dead one come when its lease ends
            store.finish([trajectory(int(episode.attempt.id[1:]))])
        learned += store.ack(ids(store.take(64, "trainer", LONG)), "trainer")
    assert sorted(learned, key=lambda id: int(id[1:])) == [f"a{k}" for k in range(300)]
    assert store.counts() == Counts(0, 0, 0, 300)


def test_a_killed_redis_that_is_started_again_has_all_that_it_answered(redis_server: RedisServer) -> None:
    store = open_store(redis_server.url, "killed", 60.0)
    store.add(attempts(400))
    answered = threading.Event()

    def write() -> None:
        for number in range(400):
            store.finish([trajectory(number)])
            if number == 100:
                answered.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert answered.wait(60)
    redis_server.kill()
    redis_server.start()
    writer.join(120)
    assert not writer.is_alive(), "it went on with the Redis that came back"
    taken = store.take(1000, "trainer", LONG)
    assert taken == [trajectory(number) for number in range(400)]
    store.close()


def test_a_store_that_is_not_there_is_one_line(tmp_path: Path, redis_server: RedisServer) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.store=redis://127\.0\.0\.1:1: no Redis answers there"):
        open_store("redis://:secret@127.0.0.1:1/0", "run", 0.2)
    with pytest.raises(ConfigError, match="must be redis://"):
        open_store("postgres://host", "run", 1)
    (tmp_path / "bad.sqlite3").write_bytes(b"this is no database, as anybody can see" * 50)
    with pytest.raises(RunError, match=r"bad\.sqlite3: file is not a database"):
        open_store(str(tmp_path / "bad.sqlite3"), "run", 1)
