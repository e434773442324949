"""One-player games of the textarena package."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeVar

from gymnasium.error import ResetNeeded

from envs.answers import split_of
from envs.base import Messages, ResetResult, StepResult, TextEnv
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task
from rubrics.environment import EnvironmentReward

T = TypeVar("T")

_TURNS = threading.Lock()
"""Games draw from Python's one global generator: they take turns with it, each with a state of its own."""


class TextArenaEnv(TextEnv):
    """A one-player game of textarena.

    What the game says since the policy's last turn is the observation; the reward, between -1 and 1, comes
    with its end. Component: `invalid`, whether the game ended with a move that it does not know.
    """

    kinds = ("game",)
    rubric = EnvironmentReward(low=-1.0, high=1.0)

    def __init__(self, game: str = "GuessTheNumber-v0") -> None:
        """`game`: its id in textarena.

        Raises:
            ConfigError: textarena is not installed, or has no such game.
        """
        super().__init__()
        try:
            import textarena
        except ImportError as error:
            raise ConfigError(f"textarena needs: pip install textarena==0.7.4 ({error})") from error
        # The raw ones tell what is new; others tell the whole game each time.
        self.game = game if game.endswith("-raw") else f"{game}-raw"
        if self.game not in textarena.envs.registration.ENV_REGISTRY:
            raise ConfigError(f"textarena has no game {game!r}")
        self._game: Any = None
        self._random_state: Any = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Seeds of games; a seed decides which split it belongs to."""
        rng = random.Random(f"textarena/{split}/{seed}")
        for place in count():
            while True:
                game_seed = rng.randrange(2**31)
                if split_of(f"{self.game} {game_seed}") == split:
                    break
            id = f"textarena/{split}/{seed}/{place}"
            data = {"game": self.game, "seed": game_seed}
            yield Task(id, "textarena", "game", split, game_seed, data)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        """Begin a game.

        Raises:
            ConfigError: it is not for one player.
        """
        import textarena

        task = self.start_episode(seed, options)
        self._random_state = None

        def begin() -> Any:
            random.seed(task.data["seed"])
            game = textarena.make(task.data["game"])
            game.reset(num_players=1, seed=task.data["seed"])
            return game

        try:
            self._game = self._alone(begin)
        except AssertionError as error:
            raise ConfigError(f"textarena's {self.game} is not for one player: {error}") from error
        return self._said(), {"task": task}

    def step(self, action: str) -> StepResult:
        """Make a move.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._game is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        done, _ = self._alone(lambda: self._game.step(action))
        if not done:
            return self._said(), 0.0, False, False, {}
        rewards, about = self._alone(self._game.close)
        self._game = None
        info = about.get(0, {})
        found = {
            "reward_components": {"invalid": float(bool(info.get("invalid_move")))},
            "detail": str(info.get("reason", "")),
        }
        return (), float(rewards[0]), True, False, found

    def _said(self) -> Messages:
        """What the game says that is new."""
        _, heard = self._alone(self._game.get_observation)
        # Of each: who says it, and what; the policy's own moves are said back to it.
        text = "\n".join(str(what).strip() for who, what, *_ in heard if who != 0)
        return (Message("user", text or "Go on."),)

    def _alone(self, work: Callable[[], T]) -> T:
        """Let the game draw from the global generator as if it were its own."""
        with _TURNS:
            others = random.getstate()
            if self._random_state is not None:
                random.setstate(self._random_state)
            try:
                return work()
            finally:
                self._random_state = random.getstate()
                random.setstate(others)
