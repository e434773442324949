"""One episode that an agent plays through the gateway."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from envs.agents import AgentEnv, Outcome
from k2rl.inference.engine import InferenceEngine
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Attempt, EpisodeLimits
from k2rl.rollouts.gateway.server import Gateway
from k2rl.rollouts.gateway.session import Session
from k2rl.rollouts.hosting import call
from k2rl.types import Trajectory


async def run_agent_episode(
    attempt: Attempt,
    env: AgentEnv,
    engine: InferenceEngine,
    chat: ChatTemplate,
    limits: EpisodeLimits,
    gateway: Gateway,
) -> Trajectory:
    """Play one episode; the trajectory has no verdict yet.

    An agent that raises once it was refused for one of the limits has come to its end (`max_turns`,
    `token_budget`, `context`), with a reward of 0.

    Raises:
        ValueError: the agent asked the policy nothing.
        Exception: whatever the agent or the engine raises; the scheduler decides what it means.
    """
    started = time.monotonic()
    with gateway.session(attempt, engine, chat, limits) as session:
        ended = await _play(env, session, gateway.url)
    trajectory = session.trajectory()
    trajectory.env_reward = ended.reward
    trajectory.reward_components = dict(ended.components)
    trajectory.seconds = time.monotonic() - started
    return trajectory


async def _play(env: AgentEnv, session: Session, url: str) -> Outcome:
    task = session.attempt.task
    agent: asyncio.Future[Outcome] = asyncio.ensure_future(call(env.run_agent, task, url, session.key))
    either: set[asyncio.Future[Any]] = {agent, session.failed}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if session.failed.done():
            session.failed.result()
        return agent.result()
    except Exception:
        if agent.done() and not session.failed.done() and session.stop_reason is not None:
            return Outcome(0.0)
        raise
    finally:
        if not agent.done():
            agent.cancel()
            await asyncio.wait({agent})
        if not agent.cancelled():
            agent.exception()  # looked at: another error is reported, or this very one
        session.failed.cancel()
