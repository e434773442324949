"""A task that a tiny random model learns in minutes, of episodes of very different lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from envs.base import TextEnv
from k2rl.types import Message, Split, Task

VOWELS = frozenset("aeiou")
MOST_TURNS = 8
MEDIAN_TURNS, SIGMA_TURNS = 2.0, 0.9

_draws = random.Random(0)


class Vowels(TextEnv):
    """The reward is the share of vowels in all that was said, over a lognormal number of turns."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        draws = random.Random(f"{split} {seed}")
        while True:
            number = draws.randrange(2**31)
            yield Task(f"{split}-{number}", "vowels", "default", split, number)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        task = self.start_episode(seed, options)
        turns = _draws.lognormvariate(0, SIGMA_TURNS) * MEDIAN_TURNS
        self._left = min(max(round(turns), 1), MOST_TURNS)
        self._said = ""
        return (Message("user", f"Sing {task.seed % 100}."),), {}

    def step(self, action: str) -> Any:
        self._said += action
        self._left -= 1
        if self._left:
            return (Message("user", "On."),), 0.0, False, False, {}
        share = sum(letter in VOWELS for letter in self._said) / max(len(self._said), 1)
        return (), share, True, False, {}
