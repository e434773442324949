"""Ideal episodes, played by the environment's own script through the very runner that RL uses."""

from __future__ import annotations

from collections.abc import Iterable

from envs.base import TextEnv
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Attempt, Episode, EpisodeLimits
from k2rl.rollouts.playing import play_episode
from k2rl.types import Message, Task, Trajectory


class ScriptedEngine:
    """An `InferenceEngine` that says given turns, in order; log-probs are 0, the weight version 0."""

    def __init__(self, turns: Iterable[str | Message], chat: ChatTemplate) -> None:
        self._turns = iter(turns)
        self._chat = chat

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        turn = next(self._turns, None)
        if turn is None:
            raise ValueError("its script is at its end, but the episode is not")
        token_ids = tuple(self._chat.turn_ids(turn))[: sampling.max_tokens]
        stopped = token_ids[-1:] == self._chat.stop_token_ids[:1]
        return Generation(token_ids, (0.0,) * len(token_ids), ((0, 0),), "stop" if stopped else "length")


async def play_script(
    env: TextEnv,
    task: Task,
    turns: Iterable[str | Message],
    chat: ChatTemplate,
    limits: EpisodeLimits,
) -> Trajectory:
    """Play `turns` as the policy's; its ids are what the policy would have had to sample.

    Raises:
        ValueError: there are too few turns to end the episode.
        Exception: what the environment raises.
    """
    attempt = Attempt(f"demonstration-{task.id}", task.id, task, temperature=0.0, seed=0)
    return await play_episode(Episode(attempt), env, ScriptedEngine(turns, chat), chat, limits)
