"""The comparison's task as an environment of k2rl: one question, one answer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import trl_task

from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task


class OneTurn(TextEnv):
    """Word problems in the order in which TRL's side gets them, whatever the seed."""

    def __init__(self) -> None:
        super().__init__()
        self._train = self._stream("train", 0)

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        return self._train if split == "train" else self._stream("eval", 1)

    def _stream(self, split: Split, seed: int) -> Iterator[Task]:
        for number, (question, answer) in zip(count(), trl_task.problems(seed), strict=False):
            data = {"question": question, "answer": answer}
            yield Task(f"{split}-{number}", "one-turn", "default", split, seed, data)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        self._task = self.start_episode(seed, options)
        return (Message("system", trl_task.SYSTEM), Message("user", self._task.data["question"])), {}

    def step(self, action: str) -> StepResult:
        return (), trl_task.reward(action, self._task.data["answer"]), True, False, {}
