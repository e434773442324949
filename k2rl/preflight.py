"""Everything that can be known to be wrong before anything heavy starts."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import envs.registry
from envs.agents import AgentEnv
from envs.base import TextEnv
from envs.coding.judging import judges_end
from k2rl.checkpoint_engine.disk import checkpoint_manifest
from k2rl.checkpoint_engine.plan import RING_SLOTS, PlanError, fit_bucket
from k2rl.config import Config, ScheduleConfig
from k2rl.config_check import check
from k2rl.critic import Critic
from k2rl.errors import ConfigError
from k2rl.hardware import fast_dtype
from k2rl.inference.arguments import check_engine_args
from k2rl.models.adapters import adapted_layers
from k2rl.models.attention import check_attention_config, says_full_attention
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.objective.budget import budget_for
from k2rl.optim.qk_rules import head_rows
from k2rl.rollouts.demonstration import play_script
from k2rl.rollouts.episode import EpisodeLimits
from k2rl.rollouts.hosting import CLOSE_DEADLINE_S, call, hosted
from k2rl.seeds import derive_seed
from k2rl.texts import curated
from k2rl.training.batch import SupervisedSequence
from k2rl.training.supervised import Corpus, demonstration_sequence
from k2rl.types import Message, Split, Task, Trajectory
from rubrics.base import Rubric
from rubrics.critics.self_critique import SelfCritique
from rubrics.deadline import MissedDeadlineError, within
from rubrics.groups import judge_group_safely
from rubrics.models import asks_run_model

T = TypeVar("T")

ROUTED_MODELS = ("deepseek_v3", "kimi_k2")
"""Types of models whose choice of experts can be replayed (`config.json` has them)."""

DRAWS_PER_DEMONSTRATION = 200
"""Training tasks to look at, for each demonstration wanted, in search of the kinds to demonstrate."""

logger = logging.getLogger(__name__)


@dataclass
class Preflight:
    """What the checks have found and built; all of it light. To be closed, for the environment's sake."""

    config: Config
    model_path: Path
    chat: ChatTemplate
    env: TextEnv
    rubric: Rubric
    eval_tasks: list[Task]
    warm_start: list[list[SupervisedSequence]]
    #: Curated texts to learn from, and those that it never sees.
    ptx: list[SupervisedSequence]
    held_out: list[SupervisedSequence] = field(default_factory=list)

    def make_env(self) -> TextEnv:
        return envs.registry.make(self.config.env.id, **self.config.env.kwargs)

    def corpus(self) -> Corpus:
        """What steps learn from beside their rewards; empty without a PTX loss."""
        ptx = self.config.ptx
        return Corpus(self.ptx if ptx.weight else [], ptx.sequences_per_step, self.config.seed)

    async def train_tasks(self, step: int, draw: int = 0) -> list[Task]:
        """The tasks of a step, and of its further draws: a function of the seed, the step and the draw.

        Raises:
            ConfigError: the environment raises, hangs or has too few.
        """
        wanted = self.config.rollout.tasks_per_step
        seed = derive_seed(self.config.seed, step, draw) if draw else derive_seed(self.config.seed, step)
        tasks = await _draw(self, "train", seed, wanted)
        if len(tasks) < wanted:
            raise ConfigError(
                f"environment {self.config.env.id!r} gives only {len(tasks)} training tasks, but a step "
                f"draws rollout.tasks_per_step={wanted}; its tasks('train', seed) should not end"
            )
        return tasks

    async def opening(self, task: Task) -> list[int]:
        """The prompt of a task's episode, as ids.

        Raises:
            ConfigError: the environment raises or hangs.
        """

        async def reset(env: TextEnv) -> list[int]:
            messages, _ = await call(env.reset, seed=task.seed, options={"task": task})
            return self.chat.prompt_ids(tuple(messages), env.tools)

        if isinstance(self.env, AgentEnv):
            return list((await self.play(task, lambda env: repeat(""))).segments[0].token_ids)
        return await _asked(self.config, f"on task {task.id}", self._hosted(reset))

    async def play(self, task: Task, script: Callable[[TextEnv], Iterable[str | Message]]) -> Trajectory:
        """Play a script as the policy's turns, with the engine's whole context for a budget.

        Raises:
            ConfigError: the environment raises or hangs, or the script is at its end before the episode is.
        """
        context = self.config.inference.max_model_len
        limits = EpisodeLimits(self.config.env.max_turns, context, context, context)

        async def episode(env: TextEnv) -> Trajectory:
            return await play_script(env, task, await call(script, env), self.chat, limits)

        return await _asked(self.config, f"on task {task.id}", self._hosted(episode))

    def _hosted(self, use: Callable[[TextEnv], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        return hosted(self.make_env, use, self.config.rollout.episode_deadline_s)

    def close(self) -> None:
        """Close the environment that gives the tasks; one that cannot is noted in the log."""
        try:
            asyncio.run(within(CLOSE_DEADLINE_S, call(self.env.close)))
        # There is nothing left to lose to it, and the run's own result is not to be lost.
        except Exception as error:
            logger.warning("close() of environment %s failed", self.config.env.id, exc_info=error)


def preflight(config: Config, training: bool = True) -> Preflight:
    """Check a configuration against the parts it names.

    Args:
        training: also prepare what only training needs (warm start, PTX).

    Raises:
        ConfigError: one line that says what is wrong and how to mend it.
    """
    check(config)
    if config.data.path is not None:
        raise ConfigError(
            f"data.path={config.data.path} is what `k2rl sft` imitates; `k2rl train` and `k2rl eval` know "
            "ptx.path and warm_start"
        )
    check_warm_up("warm_start", config.warm_start.schedule, config.warm_start.steps)
    check_engine_args(config.inference.engine_args)
    env = envs.registry.make(config.env.id, **config.env.kwargs)
    _check_kinds(config, env)
    _check_service(config, env)
    rubric = envs.registry.rubric_of(env, config.rubric.id, **config.rubric.kwargs)
    if asks_run_model(rubric) and (config.rubric.cache_verdicts or config.rollout.surplus == "park"):
        raise ConfigError(
            "a rubric that asks the policy (model: policy) changes its mind as that learns, and needs the "
            "engine to the end of a step: set rubric.cache_verdicts=false and rollout.surplus=drop"
        )
    model_path = resolve_model(config.model.path)
    _check_push_memory(config, model_path)
    if config.inference.return_routed_experts:
        _check_routers(config, model_path)
    if training:
        check_trainable(config, model_path)
    chat = ChatTemplate.from_pretrained(model_path)
    prepared = Preflight(config, model_path, chat, env, rubric, [], [], [])
    try:
        asyncio.run(_look(prepared, training))
    except BaseException:
        prepared.close()
        raise
    return prepared


def check_trainable(config: Config, model_path: Path) -> None:
    """Whether the trainer knows the model's attention, and the model has the layers that shall get adapters.

    Raises:
        ConfigError: it does not, or QK-Clip does not, or a layer is not there.
    """
    if config.lora.rank:
        adapted_layers(model_path, config.lora)
    if config.optimizer.qk_clip or not says_full_attention(model_path):
        model = check_attention_config(model_path)
    if config.optimizer.qk_clip:
        head_rows((tensor.name for tensor in checkpoint_manifest(model_path, 1).tensors), model)


def check_warm_up(key: str, schedule: ScheduleConfig, steps: int) -> None:
    """Whether a learning rate ever reaches its peak.

    Raises:
        ConfigError: it does not.
    """
    if 0 < steps < schedule.warmup_steps:
        raise ConfigError(
            f"{key}.schedule.warmup_steps={schedule.warmup_steps} is more than there are steps ({steps})"
        )


def _check_routers(config: Config, model_path: Path) -> None:
    kind = json.loads((model_path / "config.json").read_text()).get("model_type")
    if kind not in ROUTED_MODELS:
        raise ConfigError(
            f"inference.return_routed_experts=true is for models of these types: {', '.join(ROUTED_MODELS)}; "
            f"model.path={config.model.path} is of {kind}: set it to false"
        )


def _check_push_memory(config: Config, model_path: Path) -> None:
    """Whether the largest tensor can be pushed within the shared memory that it may use."""
    memory_mib = config.checkpoint_engine.memory_mib
    if not memory_mib:
        return
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = fast_dtype(gpu=config.cluster.gpus_per_worker > 0)
    try:
        fit_bucket(checkpoint_manifest(model_path, 1, dtype), int(memory_mib * 2**20), RING_SLOTS)
    except PlanError as error:
        raise ConfigError(f"checkpoint_engine.memory_mib={memory_mib}: {error}") from error


async def _look(prepared: Preflight, training: bool) -> None:
    config = prepared.config
    async with judges_end():
        prepared.eval_tasks = await _draw(prepared, "eval", 0, config.env.eval_tasks)
        if not prepared.eval_tasks:
            raise ConfigError(
                f"environment {config.env.id!r} has no held-out tasks: its tasks('eval', seed) is empty"
            )
        await _rehearse(prepared)
        if training:
            await prepared.train_tasks(1)
            prepared.ptx, prepared.held_out = curated(config, prepared.chat, prepared.eval_tasks)
            prepared.warm_start = await _warm_start(prepared)


def _check_kinds(config: Config, env: TextEnv) -> None:
    for key, kinds, remedy in (
        ("budget.per_kind", config.budget.per_kind, ""),
        (
            "warm_start.kinds",
            config.warm_start.kinds,
            "; set warm_start.kinds=[] for all, or warm_start=none",
        ),
    ):
        for kind in kinds:
            if kind not in env.kinds:
                raise ConfigError(
                    f"{key} names {kind!r}, but {config.env.id} has: {', '.join(env.kinds)}{remedy}"
                )


def _check_service(config: Config, env: TextEnv) -> None:
    if not config.env.service.workers or not (isinstance(env, AgentEnv) or config.env.id == "remote"):
        return
    why = "is served already" if config.env.id == "remote" else "is played by an agent, not in a service"
    raise ConfigError(
        f"env.service.workers={config.env.service.workers}: {config.env.id} {why}; set env.service.workers=0"
    )


async def _draw(
    prepared: Preflight, split: Split, seed: int, count: int, kinds: Iterable[str] = (), draws: int = 0
) -> list[Task]:
    """Up to `count` tasks, of these `kinds` alone where there are any, from the first `draws` of a stream.

    Raises:
        ConfigError: the environment raises or hangs, or gives what is no task.
    """
    env, wanted = prepared.env, set(kinds)

    def draw() -> list[Task]:
        tasks = []
        for task in islice(env.tasks(split, seed), draws or count):
            if not isinstance(task, Task):
                raise TypeError(f"{type(task).__name__} is no k2rl.types.Task")
            if not wanted or task.kind in wanted:
                tasks.append(task)
            if len(tasks) == count:
                break
        return tasks

    config = prepared.config
    work = within(config.rollout.episode_deadline_s, call(draw))
    return await _asked(config, f"to give tasks({split!r}, {seed})", work)


async def _rehearse(prepared: Preflight) -> None:
    """Play and judge one scripted episode, so that a judge or environment that raises is found now."""
    config, task = prepared.config, prepared.eval_tasks[0]
    trajectory = await prepared.play(task, lambda env: env.demonstration(task) or repeat(""))
    prompt = len(trajectory.segments[0].token_ids)
    budget = budget_for(task.kind, config.budget)
    if prompt + budget > config.inference.max_model_len:
        raise ConfigError(
            f"a prompt of {prompt} tokens and a budget of {budget} do not fit inference.max_model_len="
            f"{config.inference.max_model_len}; raise it or lower the budget"
        )
    if asks_run_model(prepared.rubric):
        return  # the model that judges is not there yet
    # With a rubric that compares, the episode beside itself.
    other = msgspec.structs.replace(trajectory, id=f"{trajectory.id}-again")
    pair = [trajectory, other] if prepared.rubric.needs_group else [trajectory]
    verdict, *_ = await judge_group_safely(prepared.rubric, pair, config.rubric.deadline_s)
    if not verdict.ok:
        raise ConfigError(f"the judge fails on a scripted episode: {verdict.failure}")


async def _warm_start(prepared: Preflight) -> list[list[SupervisedSequence]]:
    """The warm start's batches: demonstrations of training tasks of the chosen kinds, and texts."""
    config, settings = prepared.config, prepared.config.warm_start
    size, needed = settings.demos_per_step, settings.steps * settings.demos_per_step
    wanted = min(needed, settings.demonstrations or needed)
    if not wanted:
        return []
    draws = DRAWS_PER_DEMONSTRATION * wanted
    tasks = await _draw(prepared, "train", config.seed, wanted, settings.kinds, draws)
    if len(tasks) < wanted:
        of_kinds = f" of warm_start.kinds={settings.kinds}" if settings.kinds else ""
        raise ConfigError(
            f"the warm start wants {wanted} demonstrations, but the first {draws} training tasks of "
            f"{config.env.id!r} have {len(tasks)}{of_kinds}; choose other warm_start.kinds, fewer "
            "demonstrations, or warm_start=none"
        )
    played = [await _demonstrated(prepared, task) for task in tasks]
    sequences = [demonstration_sequence(trajectory) for trajectory in played]
    judgements = _drawn_judgements(prepared, played)
    # Without a limit a single pass, which need not be shuffled.
    corpus = Corpus(sequences, size, config.seed) if wanted < needed else None
    texts = Corpus(prepared.ptx, settings.texts, config.seed)
    return [
        [
            *(corpus.sample(step + 1) if corpus else sequences[step * size :][:size]),
            *judgements[step * settings.judgements :][: settings.judgements],
            *texts.sample(step + 1),
        ]
        for step in range(settings.steps)
    ]


def _drawn_judgements(prepared: Preflight, demonstrated: Sequence[Trajectory]) -> list[SupervisedSequence]:
    """Those of all steps of the warm start."""
    config, settings = prepared.config, prepared.config.warm_start
    if not settings.judgements:
        return []
    if not isinstance(prepared.rubric, SelfCritique):
        raise ConfigError(
            f"warm_start.judgements={settings.judgements} does nothing without rubric=self_critique; "
            "set it to 0"
        )
    critic, count = Critic(prepared.rubric, prepared.chat, config), settings.steps * settings.judgements
    made = critic.drawn(demonstrated, count, config.seed)
    if len(made) < count:
        raise ConfigError(
            f"warm_start.judgements={settings.judgements} needs demonstrations that differ, and judgements "
            f"of at most train.micro_batch_tokens={config.train.micro_batch_tokens}: "
            f"{len(made)} of {count} can be made; set it to 0"
        )
    return made


async def _demonstrated(prepared: Preflight, task: Task) -> Trajectory:
    """A demonstration, played to the end that the environment gives it."""
    config = prepared.config

    def script(env: TextEnv) -> Sequence[str | Message]:
        turns = env.demonstration(task)
        if turns is None:
            raise ConfigError(
                f"{config.env.id} demonstrates no task of kind {task.kind!r}; choose other warm_start.kinds "
                "or warm_start=none"
            )
        return turns

    trajectory = await prepared.play(task, script)
    if trajectory.stop_reason not in ("env_done", "env_truncated"):
        limit = {
            "max_turns": f"env.max_turns={config.env.max_turns}",
            "context": f"inference.max_model_len={config.inference.max_model_len}",
        }.get(trajectory.stop_reason, trajectory.stop_reason)
        raise ConfigError(
            f"the demonstration of task {task.id} is cut off by {limit}: the warm start would teach to stop "
            "half-way; raise it, or set warm_start=none"
        )
    return trajectory


async def _asked(config: Config, what: str, work: Coroutine[Any, Any, T]) -> T:
    """What an environment answers; whatever goes wrong is the configuration's fault.

    Raises:
        ConfigError: with the environment, what it was asked for, and why it failed.
    """
    try:
        return await work
    except ConfigError:
        raise
    except MissedDeadlineError as error:
        reason = f"not done within rollout.episode_deadline_s={config.rollout.episode_deadline_s:g} s"
        raise ConfigError(f"environment {config.env.id!r} fails {what}: {reason}") from error
    # Plug-in code may raise anything.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"environment {config.env.id!r} fails {what}: {reason}") from error
