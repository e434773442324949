import asyncio
import warnings
from dataclasses import dataclass, field
from inspect import iscoroutinefunction

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from envs import maybe_await
from envs.coding.judging import close_judges
from envs.tools import calling
from envs.tools.formats import written
from tests.judges import backend, judge, loop

__all__ = ["backend", "judge", "loop"]


@dataclass
class Episode:
    """What a few scripted turns led to."""

    reward: float = 0.0
    components: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)
    done: bool = False


def spelled(name: str, **arguments: str) -> str:
    """A turn with one call, as a policy writes it."""
    return written(calling(name, **arguments))


async def play_async(env, task, turns) -> Episode:
    episode = Episode()
    messages, _ = await maybe_await(env.reset(options={"task": task}))
    episode.messages += messages
    for turn in turns:
        messages, reward, terminated, truncated, info = await maybe_await(env.step(written(turn)))
        episode.messages += messages
        episode.reward += reward
        for name, value in info.get("reward_components", {}).items():
            episode.components[name] = episode.components.get(name, 0.0) + value
        if terminated or truncated:
            episode.done = True
            break
    return episode


def running(work):
    """Run on a loop of its own, whose sandboxes are closed with it."""

    async def run():
        try:
            return await work()
        finally:
            await close_judges()

    return asyncio.run(run())


@pytest.fixture(scope="session")
def play():
    """Plays an episode of scripted turns: `play(env, task, turns)`."""
    return lambda env, task, turns: asyncio.run(play_async(env, task, turns))


class Answering(gymnasium.Env):
    """An environment that is awaited, as Gymnasium's checker calls one: `run` waits for its answers."""

    def __init__(self, env, run):
        self._env, self._run = env, run
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._run(self._env.reset(seed=seed, options=options))

    def step(self, action):
        return self._run(self._env.step(action))


@pytest.fixture(scope="session")
def check_gymnasium():
    """Gymnasium's own checker, whose warnings are errors: `check(env)`, and `run` for what is awaited."""

    def check(env, run=lambda answer: answer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Nothing here renders, and that check warns about all that is not from `gymnasium.make`.
            check_env(Answering(env, run) if iscoroutinefunction(env.step) else env, skip_render_check=True)

    return check
