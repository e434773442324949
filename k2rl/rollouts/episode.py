"""One episode: the policy and an environment take turns until one of them ends it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec

from envs.base import TextEnv, maybe_await
from k2rl.inference.engine import Generation, InferenceEngine, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.seeds import derive_seed
from k2rl.types import Message, Segment, StopReason, Task, Trajectory

T = TypeVar("T")


class EpisodeLimits(msgspec.Struct, frozen=True):
    """What ends an episode that the environment does not end; all in tokens but `max_turns`."""

    max_turns: int
    max_tokens_per_turn: int
    #: Sampled tokens of the whole episode.
    token_budget: int
    #: The engine's context: prompt, tool results and sampled tokens together.
    max_model_len: int


class Attempt(msgspec.Struct, frozen=True):
    """One response to be drawn for a task."""

    id: str
    group_id: str
    task: Task
    temperature: float
    seed: int


async def run_episode(
    attempt: Attempt,
    env: TextEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
    executor: Executor,
) -> Trajectory:
    """Play one episode; the trajectory has no verdict yet.

    A turn cut at `max_tokens_per_turn` still goes to the environment. An episode that reaches its
    token budget or the engine's context ends there (`token_budget`), its last turn unanswered.

    Args:
        executor: runs the steps of environments that are not async, so that a slow one holds nobody up.

    Raises:
        Exception: whatever the environment or the engine raises; the scheduler decides what it means.
    """
    started = time.monotonic()
    trajectory = Trajectory(attempt.id, attempt.group_id, attempt.task, attempt.temperature)
    messages, _ = await _call(env.reset, executor, seed=attempt.task.seed, options={"task": attempt.task})
    _observe(trajectory, messages, chat.prompt_ids(messages))
    trajectory.stop_reason = await _take_turns(trajectory, attempt, env, engine, chat, limits, executor)
    trajectory.seconds = time.monotonic() - started
    return trajectory


async def _take_turns(
    trajectory: Trajectory,
    attempt: Attempt,
    env: TextEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
    executor: Executor,
) -> StopReason:
    for turn in range(limits.max_turns):
        context = trajectory.token_ids
        room = min(limits.token_budget - trajectory.num_sampled, limits.max_model_len - len(context))
        if room <= 0:
            return "token_budget"
        sampling = Sampling(
            attempt.temperature, min(room, limits.max_tokens_per_turn), turn_seed(attempt.seed, turn)
        )
        generation = await engine.generate(context, sampling)
        action = chat.decode(generation.token_ids)
        trajectory.segments += _segments(generation)
        trajectory.messages.append(Message("assistant", action))
        if generation.finish_reason == "length" and room <= limits.max_tokens_per_turn:
            return "token_budget"

        messages, reward, terminated, truncated, info = await _call(env.step, executor, action)
        trajectory.env_reward += float(reward)
        for name, value in info.get("reward_components", {}).items():
            trajectory.reward_components[name] = trajectory.reward_components.get(name, 0.0) + float(value)
        if terminated or truncated:
            trajectory.messages += messages
            return "env_done" if terminated else "env_truncated"
        if turn + 1 < limits.max_turns:
            closed = generation.finish_reason == "stop"
            _observe(trajectory, messages, chat.continuation_ids(messages, closed))
    return "max_turns"


def turn_seed(episode_seed: int, turn: int) -> int:
    """Seed of one turn's sampling: the same episode replays the same way."""
    return derive_seed(episode_seed, turn)


def _observe(trajectory: Trajectory, messages: Sequence[Message], token_ids: list[int]) -> None:
    trajectory.messages += messages
    trajectory.segments.append(Segment(tuple(token_ids), sampled=False))


def _segments(generation: Generation) -> list[Segment]:
    """One segment a weight version: a turn that outlived an update has several."""
    starts = [start for start, _ in generation.weight_spans]
    ends = [*starts[1:], len(generation.token_ids)]
    return [
        Segment(generation.token_ids[start:end], True, generation.logprobs[start:end], version)
        for (start, version), end in zip(generation.weight_spans, ends, strict=True)
    ]


async def _call(
    function: Callable[..., T | Awaitable[T]], executor: Executor, *args: Any, **kwargs: Any
) -> T:
    """Call an environment's method, async or not, without blocking the event loop."""
    if inspect.iscoroutinefunction(function):
        value: T = await function(*args, **kwargs)
        return value
    loop = asyncio.get_running_loop()
    result = await loop.run_in_executor(executor, lambda: function(*args, **kwargs))
    return await maybe_await(result)
