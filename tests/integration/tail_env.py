"""An environment whose episodes are of very different lengths, each given by what the policy says."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import count
from typing import Any

from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

ENDS_ONE_IN = 3


class Tail(TextEnv):
    """One turn in three ends the episode, by its checksum: the same actions make the same episode."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        for number in count():
            yield Task(f"{split}-{seed}-{number}", "tail", "default", split, number)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        self._turns = 0
        return (Message("user", f"Say something, {task.seed}."),), {}

    def step(self, action: str) -> StepResult:
        self._turns += 1
        over = zlib.crc32(action.encode(errors="replace")) % ENDS_ONE_IN == 0
        return (Message("user", f"{self._turns}. On."),), float(over and self._turns % 2), over, False, {}
