"""A started run, whatever it learns from: its workers, its record, its checkpoints."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from k2rl.config import Config
from k2rl.errors import RunError
from k2rl.tracking import phases
from k2rl.tracking.tracker import Tracker
from k2rl.training.checkpoint import checkpoint_folder, checkpoints, read_about
from k2rl.workers.group import WorkerGroup

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class CheckpointedRun:
    """A started run with checkpoints that can be resumed."""

    config: Config
    run_dir: Path
    tracker: Tracker
    worker: WorkerGroup
    finished_steps: int = field(default=0, kw_only=True)
    #: Whether the trainer is exactly where the record says; a checkpoint at another time would lie.
    settled: bool = field(default=False, kw_only=True)
    #: The step whose checkpoint is being written, while the run goes on.
    saving: int | None = field(default=None, kw_only=True)

    async def checkpoint_if_due(self, step: int) -> None:
        """After a step: see to the checkpoint that was begun before it, and begin one when it is time."""
        train = self.config.train
        await self.end_checkpoint()
        if step < train.steps and train.checkpoint_every and step % train.checkpoint_every == 0:
            await self.begin_checkpoint()

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
