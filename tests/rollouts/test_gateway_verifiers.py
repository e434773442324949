"""An environment of the real verifiers, played through the gateway.

It has a Python of its own: it asks for other versions of `openai` and `mcp` than vLLM."""

from __future__ import annotations

import asyncio
import subprocess
import venv
from pathlib import Path

import pytest
from agents import LIMITS, Policy, tasks

from envs.agents import CommandAgentEnv
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.gateway.episode import run_agent_episode
from k2rl.rollouts.gateway.server import Gateway
from k2rl.types import Task, Trajectory

VERSION = "0.4.0"
AGENT = Path(__file__).with_name("verifiers_agent.py")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_environment_of_verifiers_is_played_through_the_gateway(tmp_path: Path) -> None:
    venv.EnvBuilder(symlinks=True, with_pip=True).create(tmp_path)
    python = tmp_path / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-qq", f"verifiers=={VERSION}"], check=True, timeout=1000)
    chat = ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))
    policy = Policy(chat, ["Perhaps 5.", "It is 4."])
    task = Task("t", "agent", "default", "train", 0, {"question": "What is 2 + 2?", "answer": "4"})

    async def episode() -> Trajectory:
        env = CommandAgentEnv([str(python), str(AGENT)], tasks)
        async with Gateway() as gateway:
            attempt = Attempt("e", "g", task, 1.0, 0)
            return await run_agent_episode(attempt, env, policy, chat, LIMITS, gateway)

    trajectory = asyncio.run(asyncio.wait_for(episode(), 300))
    assert trajectory.env_reward == 1.0
    assert trajectory.branches == []
    assert trajectory.token_ids == [*policy.prompts[1], *policy.drawn[1]]
    assert policy.prompts[1][: len(policy.prompts[0])] == policy.prompts[0]
    assert [message.content for message in trajectory.messages] == (
        ["What is 2 + 2?", "Perhaps 5.", "Are you sure?", "It is 4."]
    )
