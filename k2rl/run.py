"""A started run: what the loop works with."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from k2rl.config import Config
from k2rl.evaluation.results import EvaluationResult, summarise
from k2rl.preflight import Preflight
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.scheduler import RolloutScheduler, check_failures
from k2rl.tracking.tracker import Tracker
from k2rl.training.supervised import PTXCorpus
from k2rl.workers.handle import Worker

T = TypeVar("T")


@dataclass
class Run:
    """A started run: what the loop works with."""

    config: Config
    prepared: Preflight
    run_dir: Path
    tracker: Tracker
    worker: Worker
    scheduler: RolloutScheduler
    ptx: PTXCorpus
    finished_steps: int = 0

    async def evaluate(self, name: str) -> EvaluationResult:
        """Greedy episodes on the held-out tasks; saved as `evaluations/<name>.json`."""
        attempts = [
            Attempt(f"{name}-{task.id}", task.id, task, temperature=0.0, seed=self.config.seed)
            for task in self.prepared.eval_tasks
        ]
        with self.tracker.phase(f"evaluate {name}", self.finished_steps):
            trajectories = await self.scheduler.run(attempts, self.tracker.progress)
        check_failures(trajectories, self.config.rollout.max_failed_share, f"evaluation {name}")
        result = summarise(name, self.finished_steps, trajectories)
        self.tracker.evaluation(result)
        return result

    async def after_step(self, step: int) -> None:
        """Checkpoint and evaluate when it is time."""
        train = self.config.train
        if train.checkpoint_every and step % train.checkpoint_every == 0 and step < train.steps:
            await self.checkpoint()
        if train.eval_every and step % train.eval_every == 0 and step < train.steps:
            await self.evaluate(f"step_{step}")

    async def checkpoint(self) -> None:
        """Save what resuming needs; older checkpoints go once the new one is complete."""
        folder = checkpoint_folder(self.run_dir, self.finished_steps)
        if folder.exists():
            return
        with self.tracker.phase("checkpoint", self.finished_steps):
            await self.worker.save(folder)
        for step, other in checkpoints(self.run_dir):
            if step != self.finished_steps:
                shutil.rmtree(other)


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run, oldest first."""
    found = (
        (re.fullmatch(r"step_(\d+)", path.name), path) for path in (run_dir / "checkpoints").glob("step_*")
    )
    return sorted((int(match[1]), path) for match, path in found if match)


async def uninterrupted(work: Awaitable[T]) -> T:
    """Let `work` end even if the caller is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
