"""What is around the loop: start, self-check, warm start, evaluations, checkpoints, the end."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import msgspec

from envs.agents import AgentEnv
from k2rl.config import Config
from k2rl.critic import Critic
from k2rl.diagnosis import activity
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.results import EvaluationResult
from k2rl.loop import train
from k2rl.models.hub import shapes_fingerprint
from k2rl.preflight import Preflight
from k2rl.rollouts.engine_model import EngineModel
from k2rl.rollouts.gateway.server import Gateway
from k2rl.rollouts.history import History
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.recording import FOLDER, STORE, read_recording, recorded_steps
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.rollouts.store.base import TrajectoryStore, open_store
from k2rl.run import Run
from k2rl.tracking import phases
from k2rl.tracking.live import LiveView
from k2rl.tracking.metrics import read_metrics
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
from k2rl.training.supervised import PTXCorpus
from k2rl.workers.cluster import ray_cluster
from k2rl.workers.group import WorkerGroup
from k2rl.workers.handle import WorkerLostError
from k2rl.workers.process import end_at_once_on
from k2rl.workers.recovery import Recovery
from k2rl.workers.spec import worker_spec
from rubrics.critics.self_critique import SelfCritique
from rubrics.models import bind_run_model

T = TypeVar("T")

logger = logging.getLogger(__name__)

SELF_CHECK_PROMPTS = 8
SELF_CHECK_TOKENS = 16


class Interrupted(Exception):  # noqa: N818  (not an error: the user's wish)
    """The user stopped the run; what it had finished is saved."""


def execute(prepared: Preflight, run_dir: Path, record: Callable[[], None]) -> Summary:
    """Train to the end, or to the first thing that stops it; leaves no process behind.

    Args:
        prepared: the checked configuration.
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
        asyncio.run(_execute(prepared, run_dir, record))
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


def execute_evaluation(prepared: Preflight, run_dir: Path) -> EvaluationResult:
    """Evaluate the configured checkpoint; raises as `execute` does."""
    return asyncio.run(_execute_evaluation(prepared, run_dir))


def check_recordings(prepared: Preflight) -> None:
    """With `debug=train_only`, check that there is something to train on.

    Raises:
        ConfigError: a step's recording is missing or damaged, or of another model.
    """
    config = prepared.config
    if config.debug.mode != "train_only":
        return
    folder = Path(config.debug.rollouts or "").expanduser()
    model = shapes_fingerprint(prepared.model_path)
    for step in range(1, config.train.steps + 1):
        recording = read_recording(folder, step)
        if recording.model != model:
            raise ConfigError(
                f"debug.rollouts={config.debug.rollouts} was recorded with another model than "
                f"model.path={config.model.path}: its weights have other shapes"
            )


def resume_step(prepared: Preflight) -> int | None:
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


async def _execute(prepared: Preflight, run_dir: Path, record: Callable[[], None]) -> None:
    """The run, with a new start of its workers whenever one of them is lost, as often as that is allowed."""
    step, record = resume_step(prepared), _once(record)
    if step is None:
        record()
    limit = prepared.config.recovery.max_restarts
    with closing(Recovery(run_dir, limit, resumed=step is not None)) as recovery:
        restart = ""
        while True:
            try:
                await _attempt(prepared, run_dir, step, recovery, restart, record)
                return
            except WorkerLostError as error:
                if not recovery.began:
                    raise  # what cannot start the first time will not the second time
                recovery.spend(error)
                restart = recovery.last
            # From scratch only before there is anything to go on from.
            step = _newest_sound(run_dir)


async def _attempt(
    prepared: Preflight,
    run_dir: Path,
    step: int | None,
    recovery: Recovery,
    restart: str,
    record: Callable[[], None],
) -> None:
    """One start of the workers; `restart` tells why it is another, if it is."""
    damaged: list[Path] = []
    if step is not None:
        remove_leftovers(run_dir)
        damaged = [folder for number, folder in checkpoints(run_dir) if number > step]
    async with started(prepared, run_dir, step, trains=True, recovery=recovery) as run:
        for folder in damaged:
            set_aside(folder)
            run.tracker.note(f"{folder.name} is damaged and was set aside; going on from step {step}")
        if restart:
            run.tracker.note(f"{restart}; going on from {'the start' if step is None else f'step {step}'}")
        await carry_out(run, step, record, recovery)


async def carry_out(
    run: Run, resume_step: int | None, record: Callable[[], None], recovery: Recovery
) -> None:
    """All the work of a started run, under watch; whatever ends it early, its finished steps are saved."""
    work = asyncio.ensure_future(_work(run, resume_step, record))
    try:
        await _supervise(run, work)
    except WorkerLostError:
        if recovery.left == 0:
            await _salvage(run)
        raise
    except Exception:
        await _salvage(run)
        raise
    if work.cancelled():
        if run.settled:
            await run.checkpoint()
        saved = _saved(run.run_dir)
        raise Interrupted(saved or "before RL began; there is nothing to resume")


async def _salvage(run: Run) -> None:
    """Save what a failing run has finished, where trainer and record agree and the worker still answers."""
    try:
        if not run.worker.lost:
            await run.end_checkpoint()
            if run.settled:
                await run.checkpoint()
    except (RunError, OSError) as error:  # the run's own error is the one to report
        logger.error("the finished steps could not be saved", exc_info=error)
        run.tracker.live.note("the finished steps could not be saved; logs/driver.log says why")
    if saved := _saved(run.run_dir):
        run.tracker.note(f"the run stopped {saved}")


def _saved(run_dir: Path) -> str:
    """Where a stopped run can be taken up; empty if nowhere."""
    found = checkpoints(run_dir)
    return f"after step {found[-1][0]}; go on with: k2rl train resume={run_dir}" if found else ""


async def _execute_evaluation(prepared: Preflight, run_dir: Path) -> EvaluationResult:
    with closing(Recovery(run_dir, prepared.config.recovery.max_restarts)) as recovery:
        return await _evaluated(prepared, run_dir, recovery)


async def _evaluated(prepared: Preflight, run_dir: Path, recovery: Recovery) -> EvaluationResult:
    async with started(prepared, run_dir, None, trains=False, recovery=recovery) as run:

        async def work() -> EvaluationResult:
            await _publish(run)
            return await run.evaluate("eval")

        task = asyncio.ensure_future(work())
        await _supervise(run, task)
        if task.cancelled():
            raise Interrupted("during the evaluation")
        return task.result()


@asynccontextmanager
async def started(
    prepared: Preflight, run_dir: Path, resume_step: int | None, trains: bool, recovery: Recovery
) -> AsyncIterator[Run]:
    """Tracker, Ray and the workers, started in this order and stopped in the other."""
    config = prepared.config
    activity.begin(run_dir / "logs", "driver")
    stop_token_ids = prepared.chat.stop_token_ids
    spec = worker_spec(config, prepared.model_path, stop_token_ids, run_dir, trains)
    whole = msgspec.to_builtins(config)
    with Tracker(run_dir, config.tracking, config.train.steps, resume_step, whole) as tracker:
        with tracker.phase(phases.START), ExitStack() as undo:
            undo.enter_context(ray_cluster(config.cluster))
            start = asyncio.ensure_future(WorkerGroup.start(config, spec, recovery))
            with _cancel_on_signal(start, tracker.live):
                await asyncio.wait({start})
            if start.cancelled():
                raise Interrupted(_saved(run_dir) or "while starting; nothing was trained yet")
            worker = start.result()
            cluster = undo.pop_all()
        tracker.note(f"computing in {worker.dtype} on {spec.device}")
        bind_run_model(prepared.rubric, EngineModel(worker, prepared.chat, config))
        gateway = Gateway(config.gateway) if isinstance(prepared.env, AgentEnv) else None
        scheduler = RolloutScheduler(
            config, worker, prepared.chat, prepared.make_env, prepared.rubric, gateway, prepared.env.rubric
        )
        ptx = PTXCorpus(prepared.ptx, config.ptx.sequences_per_step, config.seed)
        with cluster, recovery.begun(tracker.note, lambda: run.finished_steps):
            try:
                store, history = _store(config, run_dir), _history(config, run_dir, resume_step)
                pool = Pool(config, scheduler, worker, store, prepared.train_tasks, history)
                run = Run(config, prepared, run_dir, tracker, worker, scheduler, pool, ptx, resume_step or 0)
                run.critic = _critic(prepared, run_dir)
                try:
                    async with gateway or nullcontext():
                        yield run
                finally:
                    await pool.close()
            finally:
                await worker.shutdown()


def _store(config: Config, run_dir: Path) -> TrajectoryStore:
    """Where the episodes of a run are until it has learned from them."""
    plays = config.debug.mode != "train_only" and config.tracking.record_rollouts
    if config.rollout.store is None or not plays:
        path = str(run_dir / FOLDER / STORE) if plays else ":memory:"
        return open_store(path, "", config.deadlines.store_s)
    name = f"{run_dir.parent.name}/{run_dir.name}"
    return open_store(config.rollout.store, name, config.deadlines.store_s)


def _critic(prepared: Preflight, run_dir: Path) -> Critic | None:
    """The critic, where the policy judges itself, trusted as far as the steps before have found."""
    if not isinstance(prepared.rubric, SelfCritique):
        return None
    critic = Critic(prepared.rubric, prepared.chat, prepared.config)
    critic.recall(read_metrics(run_dir))
    return critic


def _history(config: Config, run_dir: Path, resume_step: int | None) -> History:
    """What the steps before this one tell about tasks."""
    history = History(config)
    for step in recorded_steps(run_dir):
        if resume_step is not None and step <= resume_step:
            for trajectory in read_recording(run_dir, step).trajectories:
                history.add(trajectory)
    return history


async def _supervise(run: Run, work: asyncio.Future[T]) -> None:
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


async def _work(run: Run, resume_step: int | None, record: Callable[[], None]) -> None:
    if resume_step is not None:
        with run.tracker.phase(phases.LOAD):
            await run.worker.load(checkpoint_folder(run.run_dir, resume_step))
        record()
        run.settled = True
    await _publish(run)
    if not run.trains:
        await train(run)
        return
    if run.serves:
        await _self_check(run)
    if resume_step is None:
        await _warm_start(run)
        run.settled = True
        await run.begin_checkpoint()
    if run.serves and run.finished_steps == 0:
        await run.evaluate("before")
    await run.checkpoint()
    await train(run)
    await run.begin_checkpoint()
    if run.serves:
        await run.evaluate("after")
    await run.checkpoint()
    # Last: a run is over when its model is there.
    with run.tracker.phase(phases.SAVE, run.finished_steps):
        await run.worker.save_pretrained(run.run_dir / "model")


async def _publish(run: Run) -> None:
    if not run.serves:
        return
    with run.tracker.phase(phases.PUBLISH):
        await run.worker.publish()


async def _self_check(run: Run) -> None:
    """Refuse to train when the weights in vLLM do not reproduce the trainer's log-probs.

    vLLM was started from random weights, so a parameter that the push missed cannot look right.

    Raises:
        RunError: with the gap.
    """
    room = run.config.inference.max_model_len - SELF_CHECK_TOKENS
    tasks = run.prepared.eval_tasks[:SELF_CHECK_PROMPTS]
    prompts = [(await run.prepared.opening(task))[:room] for task in tasks]
    with run.tracker.phase(phases.SELF_CHECK):
        gap = await run.worker.logprob_gap(prompts, SELF_CHECK_TOKENS, run.config.seed)
    limit = run.config.inference.max_logprob_gap
    if not gap["mean"] <= limit:
        raise RunError(
            f"self-check: vLLM does not reproduce the trainer's log-probs: mean gap {gap['mean']:.4f} nats "
            f"over {gap['tokens']:.0f} tokens, above inference.max_logprob_gap={limit:g}; refusing to train"
        )
    run.tracker.note(f"self-check: mean log-prob gap {gap['mean']:.5f}, max {gap['max']:.4f} nats")


async def _warm_start(run: Run) -> None:
    """Supervised steps on demonstrations, evaluated apart: the gain claimed later is RL's alone."""
    settings, worker = run.config.warm_start, run.worker
    if run.prepared.warm_start:
        if run.serves:
            await run.evaluate("base")
        await worker.reset_optimizer(settings.lr)
        with run.tracker.phase(phases.WARM_START):
            for done, batch in enumerate(run.prepared.warm_start, start=1):
                learned = await worker.sft_step(batch)
                run.tracker.progress(done, len(run.prepared.warm_start))
        run.tracker.note(f"warm start: {settings.steps} steps, last loss {learned['loss']:.3f}")
        await _publish(run)
    await worker.reset_optimizer(run.config.optimizer.lr)


def _once(action: Callable[[], None]) -> Callable[[], None]:
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
