"""A started run: what the loop works with."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from k2rl.config import Config
from k2rl.critic import Critic
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.results import EvaluationResult, summarise
from k2rl.models.hub import shapes_fingerprint
from k2rl.preflight import Preflight
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.recording import (
    Journal,
    Source,
    read_recording,
    recorded_steps,
    settings_of,
    write_recording,
)
from k2rl.rollouts.scheduler import RolloutScheduler, check_failures
from k2rl.tracking import phases
from k2rl.tracking.tracker import Tracker
from k2rl.training.checkpoint import checkpoint_folder, checkpoints, read_about
from k2rl.training.supervised import PTXCorpus
from k2rl.types import Trajectory
from k2rl.workers.group import WorkerGroup

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A started run: what the loop works with."""

    config: Config
    prepared: Preflight
    run_dir: Path
    tracker: Tracker
    worker: WorkerGroup
    scheduler: RolloutScheduler
    ptx: PTXCorpus
    #: Where the policy judges itself.
    critic: Critic | None = None
    finished_steps: int = 0
    #: Whether the trainer is exactly where the record says; a checkpoint at another time would lie.
    settled: bool = False

    @property
    def trains(self) -> bool:
        return self.config.debug.mode != "rollout_only"

    @property
    def serves(self) -> bool:
        """Whether there is an inference engine."""
        return self.config.debug.mode != "train_only"

    async def recorded(self, step: int) -> list[Trajectory] | None:
        """The step's trajectories, if they need not be sampled.

        They are another run's with `debug=train_only`. Else they are those that this run had recorded, but
        not learned from and saved, before it was stopped: if they are of the weights and settings of now.
        """
        if not self.serves:
            return read_recording(self.rollouts_folder, step).trajectories
        if step not in recorded_steps(self.run_dir):
            return None
        try:
            recording = read_recording(self.run_dir, step)
        except ConfigError as error:
            logger.warning("the rollouts of step %d are sampled again", step, exc_info=error)
            return None
        if Source(recording.model, recording.settings, recording.weights) != await self._source():
            return None
        self.tracker.note(f"step {step}: its rollouts were recorded with these weights and are used again")
        return recording.trajectories

    async def play(self, step: int, attempts: Sequence[Attempt]) -> tuple[list[Trajectory], bool]:
        """The step's trajectories, and whether all of them are new.

        If the configuration says so they are kept, each as it ends: what a run had finished before it was
        stopped, or its workers died, is not played again.
        """
        if not self.config.tracking.record_rollouts:
            return await self.scheduler.run(attempts, self.tracker.progress), True
        source = await self._source()
        with Journal(self.run_dir, step, source) as journal:
            finished = journal.finished
            if finished:
                self.tracker.note(f"step {step}: {len(finished)} of its rollouts were finished before")
            left = [attempt for attempt in attempts if attempt.id not in finished]
            played = await self.scheduler.run(left, self.tracker.progress, journal.add)
            found = finished | {trajectory.id: trajectory for trajectory in played}
            trajectories = [found[attempt.id] for attempt in attempts]
            write_recording(self.run_dir, step, source, trajectories)
            journal.remove()
        return trajectories, not finished

    @property
    def rollouts_folder(self) -> Path:
        """Of the run that has recorded the rollouts to train on, with `debug=train_only`."""
        return Path(self.config.debug.rollouts or "").expanduser()

    async def _source(self) -> Source:
        model = shapes_fingerprint(self.prepared.model_path)
        return Source(model, settings_of(self.config), await self.worker.weights_digest())

    async def evaluate(self, name: str) -> EvaluationResult:
        """Greedy episodes on the held-out tasks; saved as `evaluations/<name>.json`."""
        attempts = [
            Attempt(f"{name}-{task.id}", task.id, task, temperature=0.0, seed=self.config.seed)
            for task in self.prepared.eval_tasks
        ]
        with self.tracker.phase(phases.EVALUATE, self.finished_steps):
            trajectories = await self.scheduler.run(attempts, self.tracker.progress)
        check_failures(trajectories, self.config.rollout.max_failed_share, f"evaluation {name}")
        result = summarise(name, self.finished_steps, trajectories)
        self.tracker.evaluation(result)
        return result

    async def after_step(self, step: int) -> None:
        """Checkpoint and evaluate when it is time."""
        train = self.config.train
        if (
            self.trains
            and train.checkpoint_every
            and step % train.checkpoint_every == 0
            and step < train.steps
        ):
            await self._due_checkpoint()
        if (
            self.trains
            and self.serves
            and train.eval_every
            and step % train.eval_every == 0
            and step < train.steps
        ):
            await self.evaluate(f"step_{step}")

    async def _due_checkpoint(self) -> None:
        """A checkpoint that cannot be written (a full disk) must not end a run that is well otherwise."""
        try:
            await self.checkpoint()
        except RunError as error:
            if self.worker.lost:
                raise
            logger.error("the checkpoint of step %d was not written", self.finished_steps, exc_info=error)
            found = checkpoints(self.run_dir)
            kept = f"the last one is of step {found[-1][0]}" if found else "there is none yet"
            reason = str(error).splitlines()[0]
            self.tracker.note(f"no checkpoint of step {self.finished_steps} was written, {kept}: {reason}")

    async def checkpoint(self) -> None:
        """Save what resuming needs, unless it is saved already; then the oldest go.

        An interruption waits until it is written.
        """
        await uninterrupted(self._checkpoint())

    async def _checkpoint(self) -> None:
        folder = checkpoint_folder(self.run_dir, self.finished_steps)
        if read_about(folder) is not None:
            return
        with self.tracker.phase(phases.CHECKPOINT, self.finished_steps):
            await self.worker.save(folder)
        if read_about(folder) is None:
            raise RunError(f"the worker wrote {folder}, but it is not there; the two must share this storage")
        for _, other in checkpoints(self.run_dir)[: -self.config.train.keep_checkpoints]:
            shutil.rmtree(other)


async def uninterrupted(work: Awaitable[T]) -> T:
    """Let `work` end even if the caller is cancelled meanwhile.

    Raises:
        CancelledError: after the work, if it ended well; its own error weighs more than a wish to stop.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        raise
