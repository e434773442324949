"""Ideal episodes, played by the environment's own script through the very runner that RL uses."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

from envs.base import TextEnv
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Attempt, EpisodeLimits, run_episode
from k2rl.types import Task, Trajectory


class ScriptedEngine:
    """An `InferenceEngine` that says given turns, in order; log-probs are 0, the weight version 0."""

    def __init__(self, turns: Sequence[str], chat: ChatTemplate) -> None:
        self._turns = iter(turns)
        self._chat = chat

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        token_ids = tuple(self._chat.turn_ids(next(self._turns, "")))[: sampling.max_tokens]
        stopped = token_ids[-1:] == self._chat.stop_token_ids[:1]
        return Generation(token_ids, (0.0,) * len(token_ids), ((0, 0),), "stop" if stopped else "length")


async def play_script(
    env: TextEnv,
    task: Task,
    turns: Sequence[str],
    chat: ChatTemplate,
    limits: EpisodeLimits,
    executor: Executor,
) -> Trajectory:
    """Play `turns` as the policy's; its ids are what the policy would have had to sample."""
    attempt = Attempt(f"demonstration-{task.id}", task.id, task, temperature=0.0, seed=0)
    return await run_episode(attempt, env, ScriptedEngine(turns, chat), chat, limits, executor)
