"""A run from its start to whatever ends it: watched, taken up again when workers die, saved, written up."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from k2rl.checkpointed import CheckpointedRun
from k2rl.config import Config
from k2rl.diagnosis import activity
from k2rl.errors import ConfigError, RunError
from k2rl.models.adapters import settings
from k2rl.models.hub import shapes_fingerprint
from k2rl.tracking import phases
from k2rl.tracking.live import LiveView
from k2rl.tracking.report import write_report
from k2rl.tracking.summary import Summary, write_summary
from k2rl.tracking.tracker import Tracker
from k2rl.training.checkpoint import (
    FORMAT,
    checkpoint_folder,
    checkpoints,
    is_sound,
    read_about,
    remove_leftovers,
    set_aside,
)
from k2rl.workers.cluster import ray_cluster
from k2rl.workers.group import WorkerGroup
from k2rl.workers.handle import WorkerLostError
from k2rl.workers.process import end_at_once_on
from k2rl.workers.recovery import Recovery
from k2rl.workers.spec import WorkerSpec

R = TypeVar("R", bound=CheckpointedRun)
T = TypeVar("T")

Record = Callable[[], None]

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818  (not an error: the user's wish)
    """The user stopped the run; what it had finished is saved."""


class Prepared(Protocol):
    """What the checks before a start have found."""

    @property
    def config(self) -> Config: ...

    @property
    def model_path(self) -> Path: ...


@dataclass(frozen=True)
class Job(Generic[R]):
    """What a run does, and by which command it is taken up again."""

    command: str
    prepared: Prepared
    #: Starts the workers for the step that is resumed, or from scratch; stops them at the end.
    started: Callable[[int | None, Recovery], AbstractAsyncContextManager[R]]
    #: All the work of a started run, from the step that is resumed; calls its last argument once it is sure
    #: to begin.
    work: Callable[[R, int | None, Record], Coroutine[Any, Any, None]]


def execute(job: Job[R], run_dir: Path, record: Record) -> Summary:
    """Train to the end, or to the first thing that stops it; leaves no process behind.

    Args:
        job: of the checked configuration.
        run_dir: a folder that this process owns.
        record: writes down what the run was started with; called once it is sure to begin, so that a
            refused resume leaves the folder as it was.

    Raises:
        RunError, ConfigError: what stopped it.
        Interrupted: Ctrl-C or SIGTERM.
        In either case the finished steps are saved where the worker still can, and report and summary
        tell of them.
    """
    try:
        asyncio.run(_execute(job, run_dir, record))
    except (RunError, Interrupted):
        try:
            _write_up(run_dir)
        except (RunError, OSError) as error:  # the first error is the one to report
            logger.error("no report could be written", exc_info=error)
        raise
    return _write_up(run_dir)


def _write_up(run_dir: Path) -> Summary:
    summary = write_summary(run_dir)
    write_report(run_dir)
    return summary


def resume_step(prepared: Prepared) -> int | None:
    """The step that the run named by `resume` goes on from; None for a fresh run. Changes nothing.

    Raises:
        ConfigError: it has no whole checkpoint, or one of another model or optimizer, or is over.
    """
    config = prepared.config
    if config.resume is None:
        return None
    step = _newest_sound(Path(config.resume).expanduser())
    if step is None:
        raise ConfigError(f"resume={config.resume}: there is no whole checkpoint in its checkpoints/")
    folder = checkpoint_folder(Path(config.resume).expanduser(), step)
    about = read_about(folder)
    assert about is not None
    if about.format != FORMAT:
        raise ConfigError(f"resume={config.resume}: {folder.name} has format {about.format}, not {FORMAT}")
    if about.optimizer != config.optimizer.name:
        raise ConfigError(
            f"resume={config.resume}: optimizer.name={config.optimizer.name} cannot take up the state of "
            f"{about.optimizer}; leave optimizer.name={about.optimizer}"
        )
    if about.adapters != settings(config.lora):
        raise ConfigError(
            f"resume={config.resume}: {folder.name} was trained with {about.adapters}, not "
            f"{settings(config.lora)}; leave that as it was"
        )
    if about.shapes != shapes_fingerprint(prepared.model_path):
        raise ConfigError(
            f"resume={config.resume}: the weights of model.path={config.model.path} have other shapes than "
            f"those of {about.model}, which was trained; leave model.path as it was"
        )
    if step >= config.train.steps and (Path(config.resume).expanduser() / "model").exists():
        raise ConfigError(f"resume={config.resume}: the run is over; set train.steps above {step} to go on")
    return step


def _newest_sound(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that is whole."""
    found = checkpoints(run_dir)
    return next((step for step, folder in reversed(found) if is_sound(folder)), None)


async def _execute(job: Job[R], run_dir: Path, record: Record) -> None:
    """The run, with a new start of its workers whenever one of them is lost, as often as that is allowed."""
    step, record = resume_step(job.prepared), _once(record)
    if step is None:
        record()
    limit = job.prepared.config.recovery.max_restarts
    with closing(Recovery(run_dir, limit, resumed=step is not None)) as recovery:
        restart = ""
        while True:
            try:
                await _attempt(job, run_dir, step, recovery, restart, record)
                return
            except WorkerLostError as error:
                if not recovery.began:
                    raise  # what cannot start the first time will not the second time
                recovery.spend(error)
                restart = recovery.last
            # From scratch only before there is anything to go on from.
            step = _newest_sound(run_dir)


async def _attempt(
    job: Job[R], run_dir: Path, step: int | None, recovery: Recovery, restart: str, record: Record
) -> None:
    """One start of the workers; `restart` tells why it is another, if it is."""
    damaged: list[Path] = []
    if step is not None:
        remove_leftovers(run_dir)
        damaged = [folder for number, folder in checkpoints(run_dir) if number > step]
    async with job.started(step, recovery) as run:
        for folder in damaged:
            set_aside(folder)
            run.tracker.note(f"{folder.name} is damaged and was set aside; going on from step {step}")
        if restart:
            run.tracker.note(f"{restart}; going on from {'the start' if step is None else f'step {step}'}")
        await _carry_out(job, run, step, record, recovery)


async def _carry_out(
    job: Job[R], run: R, resume_step: int | None, record: Record, recovery: Recovery
) -> None:
    """All the work of a started run, under watch; whatever ends it early, its finished steps are saved."""
    work = asyncio.ensure_future(job.work(run, resume_step, record))
    try:
        await supervise(run, work)
    except WorkerLostError:
        if recovery.left == 0:
            await _salvage(run, job.command)
        raise
    except Exception:
        await _salvage(run, job.command)
        raise
    if work.cancelled():
        if run.settled:
            await run.checkpoint()
        saved = where_saved(run.run_dir, job.command)
        raise Interrupted(saved or "before training began; there is nothing to resume")


async def _salvage(run: CheckpointedRun, command: str) -> None:
    """Save what a failing run has finished, where trainer and record agree and the worker still answers."""
    try:
        if not run.worker.lost:
            await run.end_checkpoint()
            if run.settled:
                await run.checkpoint()
    except (RunError, OSError) as error:  # the run's own error is the one to report
        logger.error("the finished steps could not be saved", exc_info=error)
        run.tracker.live.note("the finished steps could not be saved; logs/driver.log says why")
    if saved := where_saved(run.run_dir, command):
        run.tracker.note(f"the run stopped {saved}")


def where_saved(run_dir: Path, command: str) -> str:
    """Where a stopped run can be taken up, and with which command; empty if nowhere."""
    found = checkpoints(run_dir)
    return f"after step {found[-1][0]}; go on with: k2rl {command} resume={run_dir}" if found else ""


@asynccontextmanager
async def started_workers(
    config: Config, spec: WorkerSpec, run_dir: Path, resume_step: int | None, command: str, recovery: Recovery
) -> AsyncIterator[tuple[Tracker, WorkerGroup]]:
    """Tracker, Ray and the workers, started in this order and stopped in the other.

    Raises:
        Interrupted: while they start.
    """
    activity.begin(run_dir / "logs", "driver")
    whole = msgspec.to_builtins(config)
    with Tracker(run_dir, config.tracking, config.train.steps, resume_step, whole) as tracker:
        with tracker.phase(phases.START), ExitStack() as undo:
            undo.enter_context(ray_cluster(config.cluster))
            start = asyncio.ensure_future(WorkerGroup.start(config, spec, recovery))
            with _cancel_on_signal(start, tracker.live):
                await asyncio.wait({start})
            if start.cancelled():
                saved = where_saved(run_dir, command)
                raise Interrupted(saved or "while starting; nothing was trained yet")
            worker = start.result()
            cluster = undo.pop_all()
        tracker.note(f"computing in {worker.dtype} on {spec.device}")
        with cluster:
            try:
                yield tracker, worker
            finally:
                await worker.shutdown()


async def supervise(run: CheckpointedRun, work: asyncio.Future[T]) -> None:
    """Wait for the work under watch; returns when it is done or was interrupted.

    Raises:
        RunError: what the work or the watch found; a dead worker is reported even if the work still waits.
    """
    watch: asyncio.Future[None] = asyncio.ensure_future(run.worker.watch())
    with _cancel_on_signal(work, run.tracker.live):
        await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        if watch.done() and not work.done():
            work.cancel()
            await asyncio.wait({work})
            watch.result()
        await asyncio.wait({work})
    watch.cancel()
    await asyncio.wait({watch})
    if not work.cancelled():
        work.result()


def _once(action: Record) -> Record:
    """Does it when it is called for the first time."""
    return functools.cache(action)


@contextmanager
def _cancel_on_signal(task: asyncio.Future[T], live: LiveView) -> Iterator[None]:
    """First Ctrl-C or SIGTERM: say so and cancel `task`, which then saves. Second: stop at once."""
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        end_at_once_on(signal.SIGINT, signal.SIGTERM)
        task.cancel()
        live.stopping()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
