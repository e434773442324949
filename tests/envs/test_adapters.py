"""Environments of other packages, against the packages themselves."""

from __future__ import annotations

import random
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import gymnasium
import pytest

import envs
from k2rl.errors import ConfigError


def bisection(env: Any, task: Any) -> tuple[float, list[str]]:
    """Guess a number by what the game says."""
    messages, _ = env.reset(options={"task": task})
    low, high = map(int, re.search(r"between (\d+) and (\d+)", messages[0].content).groups())  # type: ignore[union-attr]
    heard = [messages[0].content]
    while True:
        guess = (low + high) // 2
        messages, reward, terminated, _, _ = env.step(f"[{guess}]")
        if terminated:
            return reward, heard
        heard.append(messages[0].content)
        low, high = (guess + 1, high) if "higher" in heard[-1] else (low, guess - 1)


def test_a_game_of_textarena_is_won() -> None:
    env = envs.make("textarena", game="GuessTheNumber-v0")
    for task in islice(env.tasks("train", 0), 5):
        reward, heard = bisection(env, task)
        assert reward == 1.0
        # Each message is what is new, and not what the policy said itself.
        assert all(text.count("[GAME]") <= 1 and "[Player]" not in text for text in heard[1:])


def test_a_move_that_is_none_is_the_policys_fault() -> None:
    env = envs.make("textarena")
    env.reset(seed=0)
    for _ in range(20):
        _, reward, terminated, _, info = env.step("[5]")  # type: ignore[misc]
        if terminated:
            break
    assert info["reward_components"] == {"invalid": 1.0}
    assert reward < 1.0


def test_games_at_the_same_time_are_those_of_their_seeds() -> None:
    tasks = list(islice(envs.make("textarena").tasks("train", 1), 8))
    alone = [bisection(envs.make("textarena"), task) for task in tasks]
    state = random.getstate()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda task: bisection(envs.make("textarena"), task), tasks))
    assert together == alone
    assert random.getstate() == state


def test_what_textarena_does_not_have() -> None:
    with pytest.raises(ConfigError, match="no game 'Nothing-v0'"):
        envs.make("textarena", game="Nothing-v0")
    with pytest.raises(ConfigError, match="not for one player"):
        envs.make("textarena", game="TicTacToe-v0").reset(seed=0)


def way_out(task: Any) -> list[str]:
    """The shortest way over the ice that does not slip, by breadth-first search of the real environment."""
    ice = gymnasium.make("FrozenLake-v1", is_slippery=False).unwrapped
    start, _ = ice.reset(seed=task.data["seed"])
    queue, seen = deque([(start, [])]), {start}
    while True:
        place, way = queue.popleft()
        for action, name in enumerate(("left", "down", "right", "up")):
            ((_, reached, reward, ended),) = ice.P[place][action]  # type: ignore[attr-defined]
            if reward:
                return [*way, name]
            if not ended and reached not in seen:
                seen.add(reached)
                queue.append((reached, [*way, name]))  # type: ignore[list-item]


def test_the_ice_of_gymnasium_is_crossed(play: Any) -> None:
    env = envs.make("gymnasium", game="FrozenLake-v1", options={"is_slippery": False})
    task = next(env.tasks("train", 0))
    way = way_out(task)
    crossed = play(env, task, [f"Not left: I go {name.upper()}." for name in way])
    assert crossed.done
    assert crossed.reward == 1.0
    assert crossed.components == {"steps": float(len(way)), "unreadable": 0.0}
    assert "[S]" in crossed.messages[1].content
    lost = play(env, task, ["I wait."] * 99 + ["well"])
    assert lost.components == {"steps": 100.0, "unreadable": 100.0}
    assert lost.done


def test_observations_that_are_no_pictures_are_shown_as_they_are() -> None:
    env = envs.make("gymnasium", game="Blackjack-v1", low=-1.0)
    messages, _ = env.reset(seed=3)  # type: ignore[misc]
    assert re.search(r"\(\d+, \d+, \d\)", messages[1].content)
    _, reward, terminated, _, _ = env.step("stick")  # type: ignore[misc]
    assert terminated
    assert -1 <= reward <= 1


def test_what_gymnasium_does_not_have() -> None:
    with pytest.raises(ConfigError, match="gymnasium has no 'Nothing-v0'"):
        envs.make("gymnasium", game="Nothing-v0")
    with pytest.raises(ConfigError, match="4 actions, but 1 names"):
        envs.make("gymnasium", actions=["up"])
    with pytest.raises(ConfigError, match="neither numbered nor texts"):
        envs.make("gymnasium", game="Pendulum-v1")
