"""One episode: the policy and an environment take turns until one of them ends it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from envs.base import TextEnv
from k2rl.inference.engine import Generation, InferenceEngine, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.hosting import call
from k2rl.seeds import derive_seed
from k2rl.types import NO_WEIGHT_VERSION, Message, Segment, StopReason, Task, Trajectory

logger = logging.getLogger(__name__)


class EpisodeLimits(msgspec.Struct, frozen=True):
    """What ends an episode that the environment does not end; all in tokens but `max_turns`."""

    max_turns: int
    max_tokens_per_turn: int
    #: Sampled tokens of the whole episode.
    token_budget: int
    #: The engine's context: prompt, tool results and sampled tokens together.
    max_model_len: int
    #: Longest pattern, in tokens, whose `repeat_count`-fold repetition ends the episode; 0: none does.
    repeat_size: int = 0
    repeat_count: int = 0


class Attempt(msgspec.Struct, frozen=True):
    """One response to be drawn for a task."""

    id: str
    group_id: str
    task: Task
    temperature: float
    seed: int


class Episode(msgspec.Struct):
    """An attempt and how far it has come: all that another process needs to go on with it."""

    attempt: Attempt
    #: All turns that the environment has answered, with its answers; None: it has not begun.
    trajectory: Trajectory | None = None
    #: Those turns as the environment was given them.
    actions: list[str] = []
    #: The turn after them as far as it is sampled; unless it is `interrupted`, the environment is to answer.
    turn: Generation | None = None
    #: What the environment said of itself after them; None: it is brought there by its actions.
    snapshot: bytes | None = None

    @property
    def oldest_version(self) -> int:
        """The oldest weights that any of its tokens was sampled from; `NO_WEIGHT_VERSION` without tokens."""
        segments = self.trajectory.segments if self.trajectory is not None else []
        versions = [segment.weight_version for segment in segments if segment.sampled]
        versions += [version for _, version in self.turn.weight_spans] if self.turn is not None else []
        return min(versions, default=NO_WEIGHT_VERSION)

    @property
    def num_sampled(self) -> int:
        settled = self.trajectory.num_sampled if self.trajectory is not None else 0
        return settled + (len(self.turn.token_ids) if self.turn is not None else 0)


async def run_episode(
    episode: Episode,
    env: TextEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
) -> Trajectory:
    """Play one episode, or go on with one; the trajectory has no verdict yet.

    `episode` tells at any time how far it has come. What an engine was interrupted in is continued, under
    whatever weights that has then. An episode that has begun is brought back into `env`, which is new, by the
    environment's own snapshot or else by its actions; if it then answers otherwise than it had, the
    episode is played from its beginning.

    A turn cut at `max_tokens_per_turn` still goes to the environment. An episode that reaches its
    token budget ends there (`token_budget`), as does one that reaches the engine's context (`context`),
    be it by a long tool result, and one that repeats itself (`repetition`); its last turn stays unanswered.

    Raises:
        ValueError: the prompt alone fills the engine's context.
        Exception: whatever the environment or the engine raises; the scheduler decides what it means.
    """
    started = time.monotonic()
    before = episode.trajectory.seconds if episode.trajectory is not None else 0.0
    if episode.trajectory is None or not await _restored(episode, env):
        before = 0.0
        await _begin(episode, env, chat, limits)
    trajectory = episode.trajectory
    assert trajectory is not None
    trajectory.stop_reason = await _take_turns(episode, trajectory, env, engine, chat, limits)
    trajectory.seconds = before + time.monotonic() - started
    return trajectory


async def _begin(episode: Episode, env: TextEnv, chat: ChatTemplate, limits: EpisodeLimits) -> None:
    attempt = episode.attempt
    messages, _ = await call(env.reset, seed=attempt.task.seed, options={"task": attempt.task})
    prompt = chat.prompt_ids(messages, env.tools)
    if len(prompt) >= limits.max_model_len:
        raise ValueError(
            f"its prompt of {len(prompt)} tokens does not fit inference.max_model_len={limits.max_model_len}"
        )
    trajectory = Trajectory(attempt.id, attempt.group_id, attempt.task, attempt.temperature)
    _observe(trajectory, messages, prompt)
    episode.trajectory, episode.actions, episode.turn, episode.snapshot = trajectory, [], None, None


async def _restored(episode: Episode, env: TextEnv) -> bool:
    """Bring a new environment to where the episode's was; False if it does not get there."""
    task, trajectory = episode.attempt.task, episode.trajectory
    assert trajectory is not None
    if episode.snapshot is not None:
        await call(env.restore, task, episode.snapshot)
        return True
    messages, _ = await call(env.reset, seed=task.seed, options={"task": task})
    seen = list(messages)
    for action in episode.actions:
        messages, _, terminated, truncated, _ = await call(env.step, action)
        seen += messages
        if terminated or truncated:
            break
    if _told(seen) == _told(trajectory.messages):
        return True
    logger.warning(
        "episode %s is played from its beginning: the same actions led its environment elsewhere",
        episode.attempt.id,
    )
    return False


def _told(messages: Sequence[Message]) -> list[Message]:
    """What the environment has said."""
    return [message for message in messages if message.role != "assistant"]


async def _take_turns(
    episode: Episode,
    trajectory: Trajectory,
    env: TextEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
) -> StopReason:
    for turn in range(len(episode.actions), limits.max_turns):
        context = trajectory.token_ids
        budget = limits.token_budget - trajectory.num_sampled
        room = limits.max_model_len - len(context)
        # Where both are used up, it is the policy that wrote too much.
        if budget <= 0:
            return "token_budget"
        if room <= 0:
            return "context"
        left = min(budget, room)
        generation = await _sampled(
            episode, turn, engine, context, min(left, limits.max_tokens_per_turn), limits
        )
        action = chat.decode(generation.token_ids)
        reached = generation.finish_reason == "length" and left <= limits.max_tokens_per_turn
        if reached or generation.finish_reason == "repetition":
            _settle(episode, trajectory, generation, action)
            if not reached:
                return "repetition"
            return "token_budget" if budget <= room else "context"

        messages, reward, terminated, truncated, info = await call(env.step, action)
        _settle(episode, trajectory, generation, action)
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


async def _sampled(
    episode: Episode,
    turn: int,
    engine: InferenceEngine,
    context: Sequence[int],
    max_tokens: int,
    limits: EpisodeLimits,
) -> Generation:
    """The whole turn: what of it there is already, and the rest."""

    def keep(generation: Generation) -> None:
        episode.turn = generation

    sampling = Sampling(
        episode.attempt.temperature,
        max_tokens,
        turn_seed(episode.attempt.seed, turn),
        limits.repeat_size,
        limits.repeat_count,
    )
    return await draw_turn(engine, context, sampling, episode.turn, keep)


async def draw_turn(
    engine: InferenceEngine,
    context: Sequence[int],
    sampling: Sampling,
    done: Generation | None = None,
    keep: Callable[[Generation], None] = lambda generation: None,
) -> Generation:
    """A turn to its end, however often the engine is interrupted in it.

    Args:
        engine: that samples it.
        context: ids before the turn.
        sampling: of the whole turn.
        done: what of it there is already.
        keep: is told of what there is whenever that is more.
    """
    while done is None or done.finish_reason == "interrupted":
        start = len(done.token_ids) if done is not None else 0
        if done is not None and start >= sampling.max_tokens:
            done = msgspec.structs.replace(done, finish_reason="length")
        else:
            rest = msgspec.structs.replace(
                sampling,
                max_tokens=sampling.max_tokens - start,
                # Else it would draw the turn's first numbers again.
                seed=derive_seed(sampling.seed or 0, start) if start else sampling.seed,
            )
            drawn = await engine.generate([*context, *(done.token_ids if done is not None else ())], rest)
            done = drawn if done is None else done.followed_by(drawn)
        keep(done)
    return done


def turn_seed(episode_seed: int, turn: int) -> int:
    """Seed of one turn's sampling: the same episode replays the same way."""
    return derive_seed(episode_seed, turn)


def _settle(episode: Episode, trajectory: Trajectory, generation: Generation, action: str) -> None:
    """A turn is over: it becomes part of the trajectory."""
    trajectory.segments += turn_segments(generation)
    add_routes(trajectory, generation)
    trajectory.messages.append(Message("assistant", action))
    episode.actions.append(action)
    episode.turn = episode.snapshot = None


def _observe(trajectory: Trajectory, messages: Sequence[Message], token_ids: list[int]) -> None:
    trajectory.messages += messages
    trajectory.segments.append(Segment(tuple(token_ids), sampled=False))


def add_routes(trajectory: Trajectory, generation: Generation) -> None:
    """What a trajectory's last turn says of the experts of positions that no turn before has computed."""
    inputs = len(trajectory.token_ids) - 1
    trajectory.routes += generation.routes[len(trajectory.routes) : inputs]


def turn_segments(generation: Generation) -> list[Segment]:
    """One segment a weight version: a turn that outlived an update has several."""
    starts = [start for start, _ in generation.weight_spans]
    ends = [*starts[1:], len(generation.token_ids)]
    return [
        Segment(generation.token_ids[start:end], True, generation.logprobs[start:end], version)
        for (start, version), end in zip(generation.weight_spans, ends, strict=True)
    ]
