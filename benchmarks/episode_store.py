"""Trajectories per second through the store: played by several processes, each learned from once.

Four processes lease prompts and finish trajectories of 8 KB, in batches of 32 as episodes end together; one
trainer takes what is finished and acknowledges it. All run at the same time, against a Redis with an
append-only file that the benchmark starts, or against SQLite.

    make bench-store
    make bench-store ARGS="--trajectories 40000 --processes 4"
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import redis

from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.store.base import TrajectoryStore, open_store
from k2rl.types import Message, Segment, Task, Trajectory, Verdict

TASK = Task("task", "calculator", "add", "train", 7)
BATCH, NBYTES, LEASE_S = 32, 8192, 600.0


def trajectory(id: str) -> Trajectory:
    """Of 8 KB as it is stored."""
    segments = [Segment(tuple(range(200)), False), Segment(tuple(range(500)), True, (-0.123456,) * 500, 3)]
    found = Trajectory(id, "group", TASK, 1.0, segments, [], verdict=Verdict.scored(1.0))
    found.messages = [Message("assistant", "x" * (NBYTES - len(msgspec.msgpack.encode(found)) - 30))]
    return found


def play(url: str, holder: str) -> None:
    """A rollout process: until there is nothing more to play."""
    store = open_store(url, "bench", 60.0)
    template = trajectory("")
    while leased := store.lease(BATCH, holder, LEASE_S):
        store.finish([msgspec.structs.replace(template, id=episode.attempt.id) for episode in leased])
    store.close()


def measure(url: str, count: int, processes: int) -> tuple[float, int, int]:
    """Seconds, trajectories learned from, and how many of these were double."""
    store: TrajectoryStore = open_store(url, "bench", 60.0)
    store.add([Attempt(f"a{number}", "group", TASK, 1.0, number) for number in range(count)])
    command = [sys.executable, __file__, "--play", url]
    began = time.monotonic()
    players = [subprocess.Popen([*command, f"process {number}"]) for number in range(processes)]
    learned: list[str] = []
    first = 0.0
    while len(learned) < count:
        taken = store.take(8 * BATCH, "trainer", LEASE_S)
        if not taken:
            time.sleep(0.002)
            if all(player.poll() is not None for player in players) and not store.counts().finished:
                break
            continue
        first = first or time.monotonic()
        learned += store.ack([t.id for t in taken], "trainer")
    seconds = time.monotonic() - first
    for player in players:
        player.wait()
    print(f"  ({first - began:.1f} s until the first process had started, not counted)")
    store.close()
    return seconds, len(learned), len(learned) - len(set(learned))


def with_redis(folder: Path, count: int, processes: int) -> tuple[float, int, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = ["--port", str(port), "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    process = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
    try:
        client, url = redis.Redis(port=port), f"redis://127.0.0.1:{port}/0"
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        return measure(url, count, processes)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=40_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--play", nargs=2, metavar=("URL", "HOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        play(*arguments.play)
        return
    size = len(msgspec.msgpack.encode(trajectory("a12345")))
    print(f"{arguments.processes} rollout processes, trajectories of {size} bytes")
    with tempfile.TemporaryDirectory() as folder:
        for name, run in (
            ("Redis", lambda: with_redis(Path(folder), arguments.trajectories, arguments.processes)),
            (
                "SQLite",
                lambda: measure(str(Path(folder) / "e.sqlite3"), arguments.trajectories, arguments.processes),
            ),
        ):
            seconds, learned, double = run()
            rate = learned / seconds
            print(
                f"{name}: {rate:,.0f} trajectories/s; {learned} of {arguments.trajectories} learned from, "
                f"{double} twice"
            )


if __name__ == "__main__":
    main()
