"""A started run: what the loop works with."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from k2rl.config import Config
from k2rl.critic import Critic
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.results import EvaluationResult, summarise
from k2rl.models.hub import shapes_fingerprint
from k2rl.preflight import Preflight
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.recording import (
    Source,
    playing_settings_of,
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
class Rollouts:
    """What a step learns from."""

    trajectories: list[Trajectory]
    #: Of the weights that the step began with; tokens of others are older.
    version: int
    #: Of the sampling; empty if the step was recorded before.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """A started run: what the loop works with."""

    config: Config
    prepared: Preflight
    run_dir: Path
    tracker: Tracker
    worker: WorkerGroup
    scheduler: RolloutScheduler
    pool: Pool
    ptx: PTXCorpus
    finished_steps: int = 0
    #: Whether the trainer is exactly where the record says; a checkpoint at another time would lie.
    settled: bool = False
    #: The step whose checkpoint is being written, while the run goes on.
    saving: int | None = None
    #: Where the policy judges itself.
    critic: Critic | None = None

    @property
    def trains(self) -> bool:
        return self.config.debug.mode != "rollout_only"

    @property
    def serves(self) -> bool:
        """Whether there is an inference engine."""
        return self.config.debug.mode != "train_only"

    async def recorded(self, step: int) -> Rollouts | None:
        """The step's trajectories, if they need not be sampled.

        They are another run's with `debug=train_only`. Else they are those that this run had recorded, but
        not learned from and saved, before it was stopped: if they are of the weights and settings of now.
        """
        if not self.serves:
            found = read_recording(self.rollouts_folder, step)
            return Rollouts(found.trajectories, found.version)
        if step not in recorded_steps(self.run_dir):
            return None
        try:
            recording = read_recording(self.run_dir, step)
        except ConfigError as error:
            logger.warning("the rollouts of step %d are sampled again", step, exc_info=error)
            self.pool.forget()
            return None
        source = await self._source()
        if Source(recording.model, recording.settings, recording.weights, recording.version) != source:
            self.pool.forget()
            return None
        self.tracker.note(f"step {step}: its rollouts were recorded with these weights and are used again")
        self.pool.settle(recording.trajectories)
        return Rollouts(recording.trajectories, recording.version)

    async def play(self, step: int, temperature: float) -> tuple[Rollouts, bool]:
        """The step's rollouts, and whether all of them are new.

        Each is in the store as it ends: what a run had finished before it was stopped, or its workers died,
        is not played again; nor are the first parts of episodes that it had parked.
        """
        source = await self._source()
        model = f"{source.model} {playing_settings_of(self.config)}"
        finished = await self.pool.begin(
            model if self.pool.parks else f"{model} {source.weights} {source.settings} step {step}"
        )
        if finished:
            self.tracker.note(f"step {step}: {finished} of its rollouts were finished before")
        try:
            harvest = await self.pool.play(step, temperature, source.version, self.tracker.progress)
        except ConfigError as error:  # too late to be wrong input: the first step's tasks were there
            raise RunError(f"step {step}: {error}") from error
        if self.config.tracking.record_rollouts:
            write_recording(self.run_dir, step, source, harvest.trajectories)
        self.pool.settle(harvest.trajectories)
        return Rollouts(harvest.trajectories, source.version, harvest.metrics), not finished

    @property
    def rollouts_folder(self) -> Path:
        """Of the run that has recorded the rollouts to train on, with `debug=train_only`."""
        return Path(self.config.debug.rollouts or "").expanduser()

    async def _source(self) -> Source:
        model = shapes_fingerprint(self.prepared.model_path)
        digest = await self.worker.weights_digest()
        return Source(model, settings_of(self.config), digest, self.worker.version)

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
        due = self.trains and step < train.steps
        await self.end_checkpoint()
        if due and train.checkpoint_every and step % train.checkpoint_every == 0:
            await self.begin_checkpoint()
        if due and self.serves and train.eval_every and step % train.eval_every == 0:
            await self.evaluate(f"step_{step}")

    async def begin_checkpoint(self) -> None:
        """Have copied what resuming needs, unless it is saved already; the run goes on while it is written.

        A checkpoint that cannot be written (a full disk) is noted, and does not end a run that is well
        otherwise: `checkpoint` insists on it. An interruption waits until all is copied.
        """
        await uninterrupted(self._noting_failure(self._begin(), self.finished_steps))

    async def end_checkpoint(self) -> None:
        """Wait for the checkpoint that was begun, if there is one; fails as `begin_checkpoint` does."""
        if self.saving is not None:
            await uninterrupted(self._noting_failure(self._end(), self.saving))

    async def checkpoint(self) -> None:
        """Save what resuming needs, unless it is saved already: it is on disk when this returns.

        Raises:
            RunError: it could not be written.
        """
        await self.end_checkpoint()
        await uninterrupted(self._begin())
        await uninterrupted(self._end())

    async def _noting_failure(self, work: Awaitable[None], step: int) -> None:
        try:
            await work
        except RunError as error:
            if self.worker.lost:
                raise
            logger.error("the checkpoint of step %d was not written", step, exc_info=error)
            found = checkpoints(self.run_dir)
            kept = f"the last one is of step {found[-1][0]}" if found else "there is none yet"
            reason = str(error).splitlines()[0]
            self.tracker.note(f"no checkpoint of step {step} was written, {kept}: {reason}")

    async def _begin(self) -> None:
        folder = checkpoint_folder(self.run_dir, self.finished_steps)
        if read_about(folder) is not None:
            return
        with self.tracker.phase(phases.CHECKPOINT, self.finished_steps):
            await self.worker.save(folder)
        self.saving = self.finished_steps

    async def _end(self) -> None:
        """Wait for the files; only then do the oldest checkpoints go."""
        if self.saving is None:
            return
        folder, self.saving = checkpoint_folder(self.run_dir, self.saving), None
        with self.tracker.phase(phases.CHECKPOINT, self.finished_steps):
            await self.worker.saved()
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
