"""Real runs in which parts are killed or stopped, and which end as if nothing had been."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.restarts import read_restarts
from k2rl.tracking.timeline import read_timeline
from tests.integration.conftest import Command, wait_for

pytestmark = pytest.mark.integration

Start = Callable[..., Command]

ENGINE, WORKER, RAYLET = "VLLM::EngineCore", "ray::ColocatedWorker", "raylet/raylet"
#: Long enough for a busy machine: whoever is late is killed, healthy or not.
HEARTBEAT = "deadlines.heartbeat_s=25"


class Victim:
    """A run that things are done to."""

    def __init__(self, start: Start, tmp_path: Path, steps: int, *overrides: str) -> None:
        self.steps, self.run_dir = steps, tmp_path / "run"
        self.command = start(
            *("train", "experiment=tiny", f"train.steps={steps}", "train.checkpoint_every=2"),
            *(f"hydra.run.dir={self.run_dir}", *overrides),
            cwd=tmp_path,
        )

    def until(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(lambda: condition() or self.command.process.poll() is not None, what)
        assert self.command.process.poll() is None, self.command.finish()

    def after(self, phase: str, step: int) -> None:
        """Wait until a phase of a step, or of a later one, is over: the next is under way."""
        self.until(
            lambda: any(done.phase == phase and done.step >= step for done in read_timeline(self.run_dir)),
            f"{phase} of step {step}",
        )

    @property
    def restarts(self) -> list[str]:
        return [restart.why for restart in read_restarts(self.run_dir)]

    @property
    def last_step(self) -> int:
        rows = read_metrics(self.run_dir) if (self.run_dir / "metrics.jsonl").exists() else []
        return int(rows[-1]["step"]) if rows else 0

    def hit(self, name: str, signal_number: signal.Signals = signal.SIGKILL) -> None:
        """Do it to a process, once it is there, and wait until that was found."""
        before = len(self.restarts)
        self.until(lambda: len(self.command.all_named(name)) == 1, f"there is a {name}")
        self.command.named(name).send_signal(signal_number)
        self.until(lambda: len(self.restarts) > before, f"{name} is found to be dead")

    def ends_well(self) -> None:
        code, out, err = self.command.finish()
        assert code == 0, f"{out}\n{err}"
        assert [row["step"] for row in read_metrics(self.run_dir)] == list(range(1, self.steps + 1))
        summary = json.loads((self.run_dir / "summary.json").read_text())
        assert (summary["steps"], summary["restarts"]) == (self.steps, len(self.restarts))
        assert summary["failed_episodes"] == 0
        assert (self.run_dir / "model" / "model.safetensors").stat().st_size > 0
        notes = (self.run_dir / "notes.jsonl").read_text()
        assert all(why in notes for why in self.restarts)
        wait_for(lambda: not self.command.descendants(), "all processes end", 90)


@pytest.mark.slow
def test_a_run_outlives_the_deaths_of_its_vllm_and_its_worker(start: Start, tmp_path: Path) -> None:
    run = Victim(start, tmp_path, 8)
    run.after("publish", 2)  # in a rollout
    run.hit(ENGINE)
    run.after("rollout", run.last_step + 2)  # while it trains
    run.hit(WORKER)
    run.ends_well()
    engine, worker = run.restarts
    assert engine.startswith("the vLLM engine of worker 0 died")
    assert worker.startswith("worker 0 died while")
    assert "going on from step" in (run.run_dir / "notes.jsonl").read_text()


@pytest.mark.slow
def test_a_run_outlives_a_vllm_that_dies_in_training_or_stands_still(start: Start, tmp_path: Path) -> None:
    run = Victim(start, tmp_path, 6, HEARTBEAT)
    run.after("rollout", 1)  # while it trains
    run.hit(ENGINE)
    run.after("publish", run.last_step + 1)  # in a rollout
    run.hit(ENGINE, signal.SIGSTOP)
    run.ends_well()
    assert all("vLLM engine of worker 0" in why for why in run.restarts)


@pytest.mark.slow
def test_a_run_outlives_a_vllm_that_dies_in_a_push(start: Start, tmp_path: Path) -> None:
    run = Victim(start, tmp_path, 6)
    run.after("train", 1)
    run.hit(ENGINE)
    run.ends_well()


@pytest.mark.slow
def test_a_run_outlives_a_worker_that_stands_still_and_the_death_of_ray(start: Start, tmp_path: Path) -> None:
    run = Victim(start, tmp_path, 60, HEARTBEAT)  # enough for Ray to see it before the end
    run.after("publish", 1)
    run.hit(WORKER, signal.SIGSTOP)
    run.after("publish", run.last_step + 1)
    run.hit(RAYLET)
    run.ends_well()
