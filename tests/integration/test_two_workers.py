"""Several workers on one host: each trains a part of the model, and serves all of it or a part of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.restarts import read_restarts
from tests.integration.conftest import Command, wait_for
from tests.integration.test_recovery import Victim

pytestmark = pytest.mark.integration

Start = Callable[..., Command]

STEPS = 4


def curve(run_dir: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(run_dir)]


@pytest.mark.slow
def test_two_workers_learn_what_one_does_and_outlive_a_vllm(start: Start, tmp_path: Path) -> None:
    """One of two replicas is killed; then one worker trains on what these two have played."""
    run = Victim(start, tmp_path, STEPS, "cluster.workers=2", "model.dtype=float32")
    run.after("publish", 1)
    run.until(lambda: len(run.command.all_named("VLLM::EngineCore")) == 2, "two engine cores")
    run.command.all_named("VLLM::EngineCore")[1].kill()
    run.until(lambda: len(run.restarts) == 1, "the death is found")
    run.ends_well()
    assert "the vLLM engine of worker" in run.restarts[0]
    rows = read_metrics(run.run_dir)
    for row in rows:
        assert row["mismatch/mean_abs_gap"] < 1e-4
        if "memory/vllm_while_training_gib" in row:
            assert row["memory/vllm_while_training_gib"] < 1.25 * row["memory/vllm_without_model_gib"]
    logs = [(run.run_dir / "logs" / f"worker-{rank}.log").read_text() for rank in range(2)]
    assert all("EngineCore" in log for log in logs)

    alone = tmp_path / "alone"
    code, _, err = start(
        *("train", "experiment=tiny", f"train.steps={STEPS}", "model.dtype=float32"),
        *("debug=train_only", f"debug.rollouts={run.run_dir}", f"hydra.run.dir={alone}"),
        cwd=tmp_path,
    ).finish()
    assert code == 0, err
    for name in ("ptx/loss", "train/entropy", "train/grad_norm", "train/update_rms"):
        assert curve(alone, name) == pytest.approx(curve(run.run_dir, name), rel=1e-3), name
    assert curve(alone, "train/loss") == pytest.approx(curve(run.run_dir, "train/loss"), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_two_workers_share_a_replica(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = start(
        *("train", "experiment=tiny", "cluster.workers=2", "inference.tensor_parallel=2"),
        *("model.dtype=float32", f"hydra.run.dir={run_dir}"),
        cwd=tmp_path,
    )
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2]
    assert all(row["mismatch/mean_abs_gap"] < 1e-4 for row in read_metrics(run_dir))
    assert read_restarts(run_dir) == []
    assert json.loads((run_dir / "summary.json").read_text())["failed_episodes"] == 0
    assert "EngineCore" in (run_dir / "logs" / "worker-0.log").read_text()
    assert "EngineCore" not in (run_dir / "logs" / "worker-1.log").read_text()
    wait_for(lambda: not command.descendants(), "all processes end", 30)
