"""Whether a number is even or odd: a verdict that a tiny random model can learn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from envs.answers import split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

WORDS = ("even", "odd")
LARGEST = 999
EVAL_ONE_IN = 8


class Parity(TextEnv):
    """A number, to be answered with one word.

    Demonstrations show the form alone: which of the two words is drawn, so that what is right is left to the
    verifier to teach.
    """

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        numbers = [n for n in range(LARGEST + 1) if split_of(str(n), EVAL_ONE_IN) == split]
        draw = random.Random(f"{split} {seed}")
        while True:
            draw.shuffle(numbers)
            for number in numbers:
                yield Task(f"parity-{number}", "parity", "default", split, number)

    def demonstration(self, task: Task) -> list[str]:
        return [random.Random(f"demonstration {task.seed}").choice(WORDS)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        self._number = self.start_episode(seed, options).seed
        return (Message("user", f"Is {self._number} even or odd?"),), {}

    def step(self, action: str) -> StepResult:
        return (), float(action.strip() == WORDS[self._number % 2]), True, False, {}
