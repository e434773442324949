"""Several trainings in one started run, each from the same weights: what starting costs is paid once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from k2rl.config import Config
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.store.sqlite import SQLiteStore
from k2rl.run import Run
from k2rl.training.batch import SupervisedSequence

#: What to imitate, and at which learning rate, in updates that change nothing.
NOTHING, TOO_LITTLE = [SupervisedSequence((0, 1), (False, True))], 1e-30


async def keep(run: Run, folder: Path) -> int:
    """Save where all trainings begin, which has been published; returns the version of these weights."""
    await run.worker.save(folder)
    await run.worker.saved()
    return run.worker.version


async def back_to(run: Run, start: Path, lr: float, at: int = 0) -> None:
    """The trainer has the weights of `start`, version `at`, and a new optimizer; versions go on growing."""
    version = run.worker.version
    await run.worker.sft_step(NOTHING, TOO_LITTLE)  # with which it is the trainer's turn
    await run.worker.load(start)
    for _ in range(version + 1 - at):
        await run.worker.sft_step(NOTHING, TOO_LITTLE)
    await run.worker.reset_optimizer(lr)
    await run.worker.publish()


def arm(run: Run, config: Config) -> Run:
    """The same run with another configuration, before its first step. Its pool is to be closed."""
    prepared = replace(run.prepared, config=config)
    pool = Pool(config, run.scheduler, run.worker, SQLiteStore(Path(":memory:")), prepared.train_tasks)
    ptx = prepared.corpus()
    return replace(run, config=config, prepared=prepared, pool=pool, ptx=ptx, finished_steps=0, rewards=[])
