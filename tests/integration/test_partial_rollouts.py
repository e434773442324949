"""Partial rollouts with the real vLLM: parked while it sleeps, continued afterwards, killed and resumed."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from k2rl.rollouts.recording import FOLDER, STORE, read_recording, recorded_steps
from k2rl.tracking.metrics import read_metrics
from k2rl.training.checkpoint import checkpoints
from tests.integration.conftest import Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 6
PARTIAL = (
    *("train", "experiment=tiny", "rollout=partial", "temperature=constant", "rollout.oversample=4"),
    *(f"train.steps={STEPS}", "train.checkpoint_every=1", "env.eval_tasks=2"),
)


def test_parked_responses_go_on_under_the_next_weights_and_outlive_a_kill(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    """Of 32 responses in play vLLM computes 16 at once, and a step takes 8: some are there to be parked."""
    command = start(*PARTIAL, cwd=tmp_path)
    wait_for(lambda: _newest_checkpoint(tmp_path) > 0 and _parked(tmp_path), "something parked")
    parked = _parked(tmp_path)
    command.look()
    os.kill(command.process.pid, signal.SIGKILL)
    command.finish(90)
    (run,) = (path.parent for path in tmp_path.glob("outputs/tiny/*/metrics.jsonl"))
    assert not (run / "model").exists(), "it was over before it was killed"

    code, _, err = start("train", f"resume={run}", cwd=tmp_path).finish()
    assert code == 0, err
    assert recorded_steps(run) == list(range(1, STEPS + 1))
    recordings = [read_recording(run, step) for step in range(1, STEPS + 1)]
    ids = [t.id for recording in recordings for t in recording.trajectories]
    assert len(ids) == len(set(ids)), "nothing is learned from twice"
    assert len(ids) >= 8 * STEPS
    several = 0
    for recording in recordings:
        for trajectory in recording.trajectories:
            versions = [s.weight_version for s in trajectory.segments if s.sampled]
            assert versions == sorted(versions)
            assert recording.version - 2 <= versions[0]
            assert versions[-1] <= recording.version
            several += len(set(versions)) > 1
    assert several, "responses with tokens of several versions"
    learned = {t.id: t for recording in recordings for t in recording.trajectories}
    assert parked & learned.keys(), "what was parked before the kill was finished after it"
    metrics = read_metrics(run)
    for name in ("parked", "resumed", "staleness_max"):
        assert any(row.get(f"rollout/{name}", 0) > 0 for row in metrics), name
    # Fresh and old tokens alike are scored by the trainer as vLLM scored them, up to what training changed.
    assert all(row["mismatch/mean_abs_gap"] < 0.1 for row in metrics)


def _parked(cwd: Path) -> set[str]:
    """Ids, seen without a part in the run."""
    (path,) = cwd.glob(f"outputs/tiny/*/{FOLDER}/{STORE}")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
        return {id for (id,) in store.execute("SELECT id FROM episodes WHERE state = 0 AND parked = 1")}


def _newest_checkpoint(cwd: Path) -> int:
    return max((step for run in cwd.glob("outputs/tiny/*") for step, _ in checkpoints(run)), default=0)
