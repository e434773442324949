"""Partial rollouts with the real vLLM: parked while it sleeps, continued afterwards, killed and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import redis

from k2rl.rollouts.recording import FOLDER, STORE, Recording, read_recording, recorded_steps
from k2rl.rollouts.store.base import open_store
from k2rl.tracking.metrics import read_metrics
from k2rl.training.checkpoint import checkpoints
from k2rl.types import Trajectory
from tests.integration.conftest import Command, wait_for
from tests.redis_server import RedisServer, a_redis

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS, GROUP = 4, 4
#: Of 32 responses in play vLLM computes 16 at once, and a step takes 8: some are there to be parked.
PARTIAL = (
    *("train", "experiment=tiny", "rollout=partial", "temperature=constant", "rollout.oversample=4"),
    *("env.id=tail_env:Tail", "env.max_turns=6", "budget.default=96", f"rollout.group_size={GROUP}"),
    *(f"train.steps={STEPS}", "train.checkpoint_every=1", "env.eval_tasks=2"),
)
Start = Callable[..., Command]


@pytest.fixture(autouse=True)
def _env(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("tail_env.py"), tmp_path)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    yield from a_redis(tmp_path_factory.mktemp("redis"))


def test_broken_off_responses_go_on_under_the_next_weights_and_outlive_a_kill(
    start: Start, tmp_path: Path
) -> None:
    run = _killed_and_resumed(start, tmp_path, _parked_in_sqlite)
    recordings = _sound_recordings(run)
    turns = [turn for recording in recordings for t in recording.trajectories for turn in _turns(t)]
    assert any(len(set(versions)) > 1 for versions in turns), "a turn is broken off, and goes on"


def test_with_turns_that_end_and_redis(start: Start, tmp_path: Path, redis_server: RedisServer) -> None:
    def parked(cwd: Path) -> set[str]:
        (run,) = cwd.glob("outputs/tiny/*")
        with closing(redis.Redis.from_url(redis_server.url)) as server:
            found = server.smembers(f"k2rl:{{tiny/{run.name}}}:parked")
        return {id.decode() for id in found}  # type: ignore[union-attr]

    chosen = ("rollout.pause=turn", f"rollout.store={redis_server.url}")
    run = _killed_and_resumed(start, tmp_path, parked, *chosen)
    recordings = _sound_recordings(run)
    for recording in recordings:
        for trajectory in recording.trajectories:
            assert all(len(set(versions)) == 1 for versions in _turns(trajectory)), "no turn is broken off"
    assert not (run / FOLDER / STORE).exists()
    with closing(open_store(redis_server.url, f"tiny/{run.name}", 30.0)) as store:
        assert store.counts().learned == sum(len(recording.trajectories) for recording in recordings)


@pytest.mark.parametrize("old_tokens", ["correct", "mask"])
def test_old_tokens_are_weighed_or_left_out(start: Start, tmp_path: Path, old_tokens: str) -> None:
    """At a learning rate at which a step changes a policy that much that one sees it."""
    correction = ("objective.correction=truncated", "objective.correction_cap=2")
    chosen = (f"rollout.old_tokens={old_tokens}", "objective=grpo", *correction, "optimizer=adamw")
    command = start(*PARTIAL, *chosen, "optimizer.lr=3e-3", "hydra.run.dir=run", cwd=tmp_path)
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    run = tmp_path / "run"
    recordings, rows = _sound_recordings(run), read_metrics(run)
    assert len(rows) == STEPS
    old_seen = 0
    for recording, row in zip(recordings, rows, strict=True):
        sampled = [s for t in recording.trajectories for s in t.segments if s.sampled]
        young = sum(len(s.token_ids) for s in sampled if s.weight_version == recording.version)
        everything = sum(len(s.token_ids) for s in sampled)
        old_seen += everything > young
        if old_tokens == "mask" and not young:
            continue  # there was nothing to learn
        assert row["train/tokens"] == (young if old_tokens == "mask" else everything)
        if old_tokens == "mask" or everything == young:
            assert abs(row["train/correction_mean"] - 1) < 1e-3, "trainer and vLLM agree on what is new"
        else:
            assert abs(row["train/correction_mean"] - 1) > 1e-3, "and not on what is old"
    assert old_seen


def _killed_and_resumed(start: Start, cwd: Path, parked_in: Callable[[Path], set[str]], *chosen: str) -> Path:
    """The folder of a run that was killed with responses parked, and then went on to its end with them."""
    command = start(*PARTIAL, *chosen, cwd=cwd)

    def has_parked() -> bool:
        with suppress(ValueError, sqlite3.OperationalError):  # there is no run yet, or no store
            return _newest_checkpoint(cwd) > 0 and bool(parked_in(cwd))
        return False

    wait_for(has_parked, "something parked")
    parked = parked_in(cwd)
    command.look()
    os.kill(command.process.pid, signal.SIGKILL)
    command.finish(90)
    (run,) = (path.parent for path in cwd.glob("outputs/tiny/*/metrics.jsonl"))
    assert not (run / "model").exists(), "it was over before it was killed"
    before = len(recorded_steps(run))

    code, _, err = start("train", f"resume={run}", cwd=cwd).finish()
    assert code == 0, err
    learned = {t.id for step in range(before + 1, STEPS + 1) for t in read_recording(run, step).trajectories}
    assert parked & learned, "what was parked before the kill was finished after it"
    return run


def _sound_recordings(run: Path) -> list[Recording]:
    """A run's steps, of which everything is shown that holds for all partial rollouts."""
    assert recorded_steps(run) == list(range(1, STEPS + 1))
    recordings = [read_recording(run, step) for step in range(1, STEPS + 1)]
    ids = [t.id for recording in recordings for t in recording.trajectories]
    assert len(ids) == len(set(ids)), "nothing is learned from twice"
    assert len(ids) >= 2 * GROUP * STEPS
    several = 0
    for recording in recordings:
        for trajectory in recording.trajectories:
            versions = [version for turn in _turns(trajectory) for version in turn]
            assert versions == sorted(versions)
            assert recording.version - 2 <= versions[0]
            assert versions[-1] <= recording.version
            several += len(set(versions)) > 1
    assert several, "responses with tokens of several versions"
    metrics = read_metrics(run)
    for name in ("parked", "resumed", "staleness_max"):
        assert any(row.get(f"rollout/{name}", 0) > 0 for row in metrics), name
    assert max(row.get("rollout/staleness_max", 0) for row in metrics) <= 2
    return recordings


def _turns(trajectory: Trajectory) -> list[list[int]]:
    """The versions of each turn of the policy."""
    turns: list[list[int]] = [[]]
    for segment in trajectory.segments:
        if segment.sampled:
            turns[-1].append(segment.weight_version)
        elif turns[-1]:
            turns.append([])
    return [turn for turn in turns if turn]


def _parked_in_sqlite(cwd: Path) -> set[str]:
    """Ids, seen without a part in the run."""
    (path,) = cwd.glob(f"outputs/tiny/*/{FOLDER}/{STORE}")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
        return {id for (id,) in store.execute("SELECT id FROM episodes WHERE state = 0 AND parked = 1")}


def _newest_checkpoint(cwd: Path) -> int:
    return max((step for run in cwd.glob("outputs/tiny/*") for step, _ in checkpoints(run)), default=0)
