"""What a run of reinforcement learning does around its loop: self-check, warm start, evaluations, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from pathlib import Path

from envs.agents import AgentEnv
from envs.coding.judging import judges_end
from k2rl import lifecycle
from k2rl.config import Config
from k2rl.critic import Critic
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.results import EvaluationResult
from k2rl.lifecycle import Interrupted, Record, started_workers, supervise
from k2rl.loop import held_out, train
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
from k2rl.tracking.metrics import read_metrics, series
from k2rl.tracking.summary import Summary
from k2rl.training.checkpoint import checkpoint_folder
from k2rl.training.schedule import learning_rate
from k2rl.workers.environments import environments
from k2rl.workers.recovery import Recovery
from k2rl.workers.spec import worker_spec
from rubrics.critics.self_critique import SelfCritique
from rubrics.models import bind_run_model

COMMAND = "train"
SELF_CHECK_PROMPTS = 8
SELF_CHECK_TOKENS = 16


def execute(prepared: Preflight, run_dir: Path, record: Record) -> Summary:
    """Train by reinforcement learning; see `lifecycle.execute`."""

    def start(step: int | None, recovery: Recovery) -> AbstractAsyncContextManager[Run]:
        return started(prepared, run_dir, step, trains=True, recovery=recovery)

    return lifecycle.execute(lifecycle.Job(COMMAND, prepared, start, _work), run_dir, record)


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


async def _execute_evaluation(prepared: Preflight, run_dir: Path) -> EvaluationResult:
    with closing(Recovery(run_dir, prepared.config.recovery.max_restarts)) as recovery:
        return await _evaluated(prepared, run_dir, recovery)


async def _evaluated(prepared: Preflight, run_dir: Path, recovery: Recovery) -> EvaluationResult:
    async with started(prepared, run_dir, None, trains=False, recovery=recovery) as run:

        async def work() -> EvaluationResult:
            await _publish(run)
            return await run.evaluate("eval")

        task = asyncio.ensure_future(work())
        await supervise(run, task)
        if task.cancelled():
            raise Interrupted("during the evaluation")
        return task.result()


@asynccontextmanager
async def started(
    prepared: Preflight, run_dir: Path, resume_step: int | None, trains: bool, recovery: Recovery
) -> AsyncIterator[Run]:
    """Tracker, Ray, the workers, and what plays episodes with them."""
    config = prepared.config
    spec = worker_spec(config, prepared.model_path, prepared.chat.stop_token_ids, run_dir, trains)
    async with (
        started_workers(config, spec, run_dir, resume_step, COMMAND, recovery) as (tracker, worker),
        environments(config, prepared.make_env, tracker.note) as make_env,
    ):
        bind_run_model(prepared.rubric, EngineModel(worker, prepared.chat, config))
        gateway = Gateway(config.gateway) if isinstance(prepared.env, AgentEnv) else None
        scheduler = RolloutScheduler(
            config, worker, prepared.chat, make_env, prepared.rubric, gateway, prepared.env.rubric
        )
        with recovery.begun(tracker.note, lambda: run.finished_steps):
            store, history = _store(config, run_dir), _history(config, run_dir, resume_step)
            pool = Pool(config, scheduler, worker, store, prepared.train_tasks, history)
            run = Run(
                config,
                run_dir,
                tracker,
                worker,
                prepared,
                scheduler,
                pool,
                prepared.corpus(),
                finished_steps=resume_step or 0,
                critic=_critic(prepared, run_dir),
                rewards=[reward for _, reward in series(read_metrics(run_dir), "reward/mean")],
            )
            async with judges_end():
                try:
                    async with gateway or nullcontext():
                        yield run
                finally:
                    await pool.close()


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
    if 1 in recorded_steps(run_dir):
        critic.keep_first(read_recording(run_dir, 1).trajectories)
    return critic


def _history(config: Config, run_dir: Path, resume_step: int | None) -> History:
    """What the steps before this one tell about tasks."""
    history = History(config)
    for step in recorded_steps(run_dir):
        if resume_step is not None and step <= resume_step:
            for trajectory in read_recording(run_dir, step).trajectories:
                history.add(trajectory)
    return history


async def _work(run: Run, resume_step: int | None, record: Record) -> None:
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
        await warm_start(run)
        run.settled = True
        await run.begin_checkpoint()
    if run.serves and run.finished_steps == 0:
        await run.evaluate("before")
    await run.checkpoint()
    await _before(run)
    await train(run)
    await run.begin_checkpoint()
    if run.serves:
        await run.evaluate("after")
    await run.checkpoint()
    # Last: a run is over when its model is there.
    with run.tracker.phase(phases.SAVE, run.finished_steps):
        await run.worker.save_pretrained(run.run_dir / "model")


async def _before(run: Run) -> None:
    """How likely held-out texts are before the first step, as step 0 of the record."""
    if not (run.finished_steps or read_metrics(run.run_dir)) and (metrics := await held_out(run)):
        run.tracker.step(0, metrics)


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


async def warm_start(run: Run) -> None:
    """Supervised steps on demonstrations, evaluated apart: the gain claimed later is RL's alone."""
    settings, worker = run.config.warm_start, run.worker
    if run.prepared.warm_start:
        if run.serves:
            await run.evaluate("base")
        await worker.reset_optimizer(settings.lr)
        with run.tracker.phase(phases.WARM_START):
            for number, batch in enumerate(run.prepared.warm_start, start=1):
                lr = learning_rate(settings.lr, settings.schedule, number, settings.steps)
                learned = await worker.sft_step(batch, lr)
                run.tracker.progress(number, settings.steps)
        run.tracker.note(f"warm start: {settings.steps} steps, last loss {learned['loss']:.3f}")
        await _publish(run)
    await worker.reset_optimizer(run.config.optimizer.lr)
