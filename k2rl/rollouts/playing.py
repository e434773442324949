"""An episode of whatever kind: one that takes turns with its environment, or one that its agent plays."""

from __future__ import annotations

from envs.agents import AgentEnv
from envs.base import TextEnv
from k2rl.inference.engine import InferenceEngine
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Episode, EpisodeLimits, run_episode
from k2rl.rollouts.gateway.episode import run_agent_episode
from k2rl.rollouts.gateway.server import Gateway
from k2rl.types import Trajectory


async def play_episode(
    episode: Episode,
    env: TextEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
    gateway: Gateway | None = None,
) -> Trajectory:
    """Play one episode, or go on with one; the trajectory has no verdict yet.

    What an agent was at in a process that is no more cannot be taken up: its episode is played from its
    beginning.

    Args:
        gateway: where agents ask; without one, an episode opens its own.

    Raises:
        Exception: whatever the environment, the agent or the engine raises.
    """
    if not isinstance(env, AgentEnv):
        return await run_episode(episode, env, engine, chat, limits)
    if gateway is not None:
        return await run_agent_episode(episode.attempt, env, engine, chat, limits, gateway)
    async with Gateway() as own:
        return await run_agent_episode(episode.attempt, env, engine, chat, limits, own)
