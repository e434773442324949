"""One episode: the policy and an environment take turns until one of them ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from envs.base import TextEnv
from k2rl.inference.engine import Generation, InferenceEngine, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.hosting import call
from k2rl.seeds import derive_seed
from k2rl.types import Message, Segment, StopReason, Task, Trajectory


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
) -> Trajectory:
    """Play one episode; the trajectory has no verdict yet.

    A turn cut at `max_tokens_per_turn` still goes to the environment. An episode that reaches its
    token budget ends there (`token_budget`), as does one that reaches the engine's context (`context`),
    be it by a long tool result; its last turn stays unanswered.

    Raises:
        ValueError: the prompt alone fills the engine's context.
        Exception: whatever the environment or the engine raises; the scheduler decides what it means.
    """
    started = time.monotonic()
    trajectory = Trajectory(attempt.id, attempt.group_id, attempt.task, attempt.temperature)
    messages, _ = await call(env.reset, seed=attempt.task.seed, options={"task": attempt.task})
    prompt = chat.prompt_ids(messages, env.tools)
    if len(prompt) >= limits.max_model_len:
        raise ValueError(
            f"its prompt of {len(prompt)} tokens does not fit inference.max_model_len={limits.max_model_len}"
        )
    _observe(trajectory, messages, prompt)
    trajectory.stop_reason = await _take_turns(trajectory, attempt, env, engine, chat, limits)
    trajectory.seconds = time.monotonic() - started
    return trajectory


async def _take_turns(
    trajectory: Trajectory,
    attempt: Attempt,
    env: TextEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
) -> StopReason:
    for turn in range(limits.max_turns):
        context = trajectory.token_ids
        budget = limits.token_budget - trajectory.num_sampled
        room = limits.max_model_len - len(context)
        # Where both are used up, it is the policy that wrote too much.
        if budget <= 0:
            return "token_budget"
        if room <= 0:
            return "context"
        left = min(budget, room)
        sampling = Sampling(
            attempt.temperature, min(left, limits.max_tokens_per_turn), turn_seed(attempt.seed, turn)
        )
        generation = await engine.generate(context, sampling)
        action = chat.decode(generation.token_ids)
        trajectory.segments += _segments(generation)
        trajectory.messages.append(Message("assistant", action))
        if generation.finish_reason == "length" and left <= limits.max_tokens_per_turn:
            return "token_budget" if budget <= room else "context"

        messages, reward, terminated, truncated, info = await call(env.step, action)
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
