"""Everything that can be known to be wrong before anything heavy starts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import envs.registry
from envs.base import TextEnv
from k2rl.config import Config, check
from k2rl.errors import ConfigError
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.objective.budget import budget_for
from k2rl.rollouts.demonstration import play_script
from k2rl.rollouts.episode import EpisodeLimits
from k2rl.rollouts.threads import DaemonThreads
from k2rl.training.batch import SupervisedSequence
from k2rl.training.chats import load_chats
from k2rl.training.supervised import chat_sequence, demonstration_sequence
from k2rl.types import Task, Trajectory
from rubrics.base import Rubric, judge_safely


@dataclass
class Preflight:
    """What the checks have found and built; all of it light."""

    config: Config
    model_path: Path
    chat: ChatTemplate
    env: TextEnv
    rubric: Rubric
    eval_tasks: list[Task]
    warm_start: list[list[SupervisedSequence]]
    ptx: list[SupervisedSequence]

    def make_env(self) -> TextEnv:
        return envs.registry.make(self.config.env.id, **self.config.env.kwargs)


def preflight(config: Config, training: bool = True) -> Preflight:
    """Check a configuration against the parts it names.

    Args:
        training: also prepare what only training needs (warm start, PTX).

    Raises:
        ConfigError: one line that says what is wrong and how to mend it.
    """
    check(config)
    env = envs.registry.make(config.env.id, **config.env.kwargs)
    _check_kinds(config, env)
    rubric = envs.registry.rubric_of(env, config.rubric.id, **config.rubric.kwargs)
    model_path = resolve_model(config.model.path)
    chat = ChatTemplate.from_pretrained(model_path)
    eval_tasks = list(islice(env.tasks("eval", 0), config.env.eval_tasks))
    if not eval_tasks:
        raise ConfigError(
            f"environment {config.env.id!r} has no held-out tasks: its tasks('eval', seed) is empty"
        )
    prepared = Preflight(config, model_path, chat, env, rubric, eval_tasks, [], [])
    asyncio.run(_rehearse(prepared))
    if training:
        prepared.warm_start = asyncio.run(_warm_start(prepared))
        prepared.ptx = _ptx(config, chat)
    return prepared


def _check_kinds(config: Config, env: TextEnv) -> None:
    for key, kinds in {
        "budget.per_kind": config.budget.per_kind,
        "warm_start.kinds": config.warm_start.kinds,
    }.items():
        for kind in kinds:
            if kind not in env.kinds:
                raise ConfigError(f"{key} names {kind!r}, but {config.env.id} has: {', '.join(env.kinds)}")


async def _rehearse(prepared: Preflight) -> None:
    """Play and judge one scripted episode, so that a judge or environment that raises is found now."""
    config, env, task = prepared.config, prepared.make_env(), prepared.eval_tasks[0]
    turns = env.demonstration(task) or [""]
    try:
        trajectory = await _play(prepared, env, task, turns)
    # Plug-in code may raise anything.
    except Exception as error:
        raise ConfigError(
            f"environment {config.env.id!r} fails on task {task.id}: {type(error).__name__}: {error}"
        ) from error
    prompt = len(trajectory.segments[0].token_ids)
    budget = budget_for(task.kind, config.budget)
    if prompt + budget > config.inference.max_model_len:
        raise ConfigError(
            f"a prompt of {prompt} tokens and a budget of {budget} do not fit inference.max_model_len="
            f"{config.inference.max_model_len}; raise it or lower the budget"
        )
    verdict = await judge_safely(prepared.rubric, trajectory, config.rubric.deadline_s)
    if not verdict.ok:
        raise ConfigError(f"the judge fails on a scripted episode: {verdict.failure}")


async def _warm_start(prepared: Preflight) -> list[list[SupervisedSequence]]:
    """The warm start's batches of demonstrations, drawn from the training tasks of the chosen kinds."""
    config = prepared.config
    settings, env = config.warm_start, prepared.make_env()
    if settings.steps == 0:
        return []
    kinds = settings.kinds or env.kinds
    tasks = (task for task in env.tasks("train", config.seed) if task.kind in kinds)
    sequences = []
    for task in islice(tasks, settings.steps * settings.demos_per_step):
        turns = env.demonstration(task)
        if turns is None:
            raise ConfigError(
                f"{config.env.id} demonstrates no task of kind {task.kind!r}; set warm_start.steps=0"
            )
        sequences.append(demonstration_sequence(await _play(prepared, env, task, turns)))
    size = settings.demos_per_step
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


async def _play(prepared: Preflight, env: TextEnv, task: Task, turns: list[str]) -> Trajectory:
    config = prepared.config
    limits = EpisodeLimits(
        max_turns=config.env.max_turns,
        max_tokens_per_turn=config.inference.max_model_len,
        token_budget=config.inference.max_model_len,
        max_model_len=config.inference.max_model_len,
    )
    executor = DaemonThreads(1, "environment")
    try:
        return await play_script(env, task, turns, prepared.chat, limits, executor)
    finally:
        executor.shutdown(wait=False)


def _ptx(config: Config, chat: ChatTemplate) -> list[SupervisedSequence]:
    if config.ptx.weight == 0:
        return []
    return [
        chat_sequence(messages, chat, f"{config.ptx.path}:{number}")
        for number, messages in enumerate(load_chats(config.ptx.path), start=1)
    ]
