"""A real run in which vLLM stands still, and nobody starts it again: the error says who and where."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from k2rl.cli import main
from k2rl.tracking.metrics import read_metrics
from tests.integration.conftest import Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_a_stopped_vllm_worker_is_named_with_what_it_was_doing(
    start: Callable[..., Command], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    overrides = ["train.steps=1000", "train.checkpoint_every=0", "recovery.max_restarts=0"]
    command = start(
        *("train", "experiment=tiny", "deadlines.heartbeat_s=8", f"hydra.run.dir={run_dir}", *overrides),
        cwd=tmp_path,
    )
    metrics = run_dir / "metrics.jsonl"
    wait_for(
        lambda: (metrics.exists() and bool(read_metrics(run_dir))) or command.process.poll() is not None,
        "the first step",
    )
    assert command.process.poll() is None, command.finish()

    assert main(["stacks", str(run_dir)]) == 0
    parts = capsys.readouterr().out
    for name in ("driver", "worker 0", "fork server", "EngineCore", "VllmWorker", "Ray's raylet"):
        assert any(name in line and "(process " in line for line in parts.splitlines()), (name, parts)
    assert f"driver (process {command.process.pid}): " in parts

    victim = command.named("VLLM::Worker")
    victim.send_signal(signal.SIGSTOP)
    code, _, err = command.finish()
    assert code == 1, err
    assert "it did not answer for 8 s" in err
    (line,) = (line for line in err.splitlines() if "STOPPED" in line)
    assert f"of worker 0 (process {victim.pid}): STOPPED" in line
    assert f"VllmWorker-0 of worker 0 (process {victim.pid}, thread MainThread):\n" in err, err
    (dump,) = (run_dir / "logs").glob("hang-*.txt")
    assert str(dump) in err
    assert "worker_busy_loop" in dump.read_text()
    wait_for(lambda: not command.descendants(), "all processes end", 90)
