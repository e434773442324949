"""Which of two numbers is larger, or smaller: a task for models that know nothing yet."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from typing import Any

from gymnasium.error import ResetNeeded

from envs.answers import split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

EVAL_ONE_IN = 8
WORDS = ("first", "second")


class ComparisonEnv(TextEnv):
    """Two numbers between 10 and 99, and one word in reply: `first` or `second`.

    The reward is 1 for the right word, else 0. Component: `readable`, for a reply that is either word.
    """

    kinds = ("larger", "smaller")

    def __init__(self) -> None:
        super().__init__()
        self._task: Task | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Kinds in turn; two numbers, in either order, are for one split alone, whatever is asked."""
        rng = random.Random(f"comparison/{split}/{seed}")
        for index in count():
            kind = self.kinds[index % len(self.kinds)]
            while True:
                numbers = [rng.randint(10, 99) for _ in WORDS]
                if numbers[0] != numbers[1] and split_of(f"{sorted(numbers)}", EVAL_ONE_IN) == split:
                    break
            data = {"numbers": numbers}
            yield Task(f"comparison/{split}/{seed}/{index}", "comparison", kind, split, index, data)

    def demonstration(self, task: Task) -> list[str]:
        return [_answer(task)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        self._task = self.start_episode(seed, options)
        first, second = self._task.data["numbers"]
        return (Message("user", f"{self._task.kind}: {first} or {second}?"),), {"task": self._task}

    def step(self, action: str) -> StepResult:
        """Look at the word.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._task is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        said, right = action.strip().lower(), _answer(self._task)
        self._task = None
        info = {"reward_components": {"readable": float(said in WORDS)}}
        return (), float(said == right), True, False, info


def _answer(task: Task) -> str:
    first, second = task.data["numbers"]
    return WORDS[(first < second) == (task.kind == "larger")]
