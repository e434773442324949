"""Gymnasium's environments whose states can be read and whose actions have names."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Discrete, Text

from envs.answers import split_of
from envs.base import Messages, ResetResult, StepResult, TextEnv
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task
from rubrics.environment import EnvironmentReward

#: Of Gymnasium's own: what their numbered actions mean.
ACTIONS = {
    "FrozenLake-v1": ("left", "down", "right", "up"),
    "CliffWalking-v1": ("up", "right", "down", "left"),
    "Taxi-v3": ("south", "north", "east", "west", "pickup", "dropoff"),
    "Blackjack-v1": ("stick", "hit"),
}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m([^\x1b]*)\x1b\[0m")


class GymnasiumTextEnv(TextEnv):
    """An environment of Gymnasium that can be read: it renders as text, or its observations are words.

    The policy's action is the last of the actions' names in its turn, or the whole turn where actions are
    texts. A turn without one is answered, and changes nothing. Components: `steps` and `unreadable`.
    """

    kinds = ("game",)

    def __init__(
        self,
        game: str = "FrozenLake-v1",
        actions: Sequence[str] | None = None,
        low: float = 0.0,
        high: float = 1.0,
        max_steps: int = 100,
        options: dict[str, Any] | None = None,
    ) -> None:
        """`game`: its id; `actions`: names of its numbered actions; `low`, `high`: of the summed reward;
        `max_steps`: turns after which the episode is cut; `options`: further arguments of `gymnasium.make`.

        Raises:
            ConfigError: there is no such environment, or its actions are neither numbered nor texts.
        """
        super().__init__()
        self.rubric = EnvironmentReward(low, high)
        self.game, self._options, self._max_steps = game, dict(options or {}), max_steps
        try:
            metadata = gymnasium.make(game, **self._options).metadata
        except gymnasium.error.Error as error:
            raise ConfigError(f"gymnasium has no {game!r}: {' '.join(str(error).split())}") from error
        self._renders = "ansi" in metadata.get("render_modes", ())
        self._game = self._make()
        space = self._game.action_space
        if not isinstance(space, Discrete | Text):
            raise ConfigError(f"the actions of {game} are neither numbered nor texts: {space}")
        names = actions or ACTIONS.get(game, ())
        self._names: tuple[str, ...] = ()
        if isinstance(space, Discrete):
            self._names = tuple(names) or tuple(map(str, range(space.start, space.start + space.n)))
            if len(self._names) != space.n:
                raise ConfigError(f"{game} has {space.n} actions, but {len(self._names)} names were given")
            self._first = int(space.start)
        self._steps, self._running = 0, False

    def _make(self) -> gymnasium.Env[Any, Any]:
        mode = {"render_mode": "ansi"} if self._renders else {}
        return gymnasium.make(self.game, **mode, **self._options)

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Seeds; a seed decides which split it belongs to."""
        rng = random.Random(f"gymnasium/{split}/{seed}")
        for place in count():
            while True:
                game_seed = rng.randrange(2**31)
                if split_of(f"{self.game} {game_seed}") == split:
                    break
            id = f"gymnasium/{self.game}/{split}/{seed}/{place}"
            yield Task(id, "gymnasium", "game", split, game_seed, {"game": self.game, "seed": game_seed})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        observation, _ = self._game.reset(seed=task.data["seed"])
        self._steps, self._running = 0, True
        ask = f"Say one of: {', '.join(self._names)}." if self._names else "Say what you do."
        system = f"You play {self.game}. {ask}"
        return (Message("system", system), *self._shown(observation)), {"task": task}

    def step(self, action: str) -> StepResult:
        """Do the action that the turn names.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if not self._running:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        self._steps += 1
        cut = self._steps >= self._max_steps
        chosen = self._chosen(action)
        if chosen is None:
            self._running = not cut
            reply = Message("user", f"That names no action. Say one of: {', '.join(self._names)}.")
            info = {"reward_components": {"steps": 1.0, "unreadable": 1.0}}
            return (reply,), 0.0, False, cut, info
        observation, reward, terminated, truncated, _ = self._game.step(chosen)
        self._running = not (terminated or truncated or cut)
        info = {"reward_components": {"steps": 1.0, "unreadable": 0.0}}
        return self._shown(observation), float(reward), bool(terminated), bool(truncated or cut), info

    def _chosen(self, action: str) -> Any:
        if not self._names:
            return action if self._game.action_space.contains(action) else None
        said = re.findall(rf"\b({'|'.join(map(re.escape, self._names))})\b", action, re.IGNORECASE)
        lowered = [name.lower() for name in self._names]
        return self._first + lowered.index(said[-1].lower()) if said else None

    def _shown(self, observation: Any) -> Messages:
        # What a terminal would colour, such as the place where one stands, is put in brackets.
        drawn = self._game.render() if self._renders else None
        text = _COLOUR.sub(r"[\1]", str(drawn)) if drawn is not None else str(observation)
        return (Message("user", text.strip("\n") or "(nothing)"),)

    def close(self) -> None:
        self._game.close()
