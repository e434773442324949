"""An environment with a long tail: lognormal numbers of turns, and of seconds that its tool takes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

from envs.base import TextEnv
from k2rl.types import Message, Split, Task, Trajectory, Verdict
from rubrics.base import Rubric

MOST_TURNS = 40
MEDIAN_TURNS, SIGMA_TURNS = 3.0, 1.0
MEDIAN_S, SIGMA_S, MOST_S = 0.1, 1.0, 3.0

_draws = random.Random(0)


class ByTurns(Rubric):
    """Some number that differs between responses: the trainer is to have work, not to learn."""

    async def judge(self, trajectory: Trajectory) -> Verdict:
        return Verdict.scored(len(trajectory.segments) % 5 / 4)


class LongTail(TextEnv):
    rubric = ByTurns()

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        draws = random.Random(f"{split} {seed}")
        while True:
            number = draws.randrange(2**31)
            yield Task(f"{split}-{number}", "long-tail", "default", split, number)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.start_episode(seed, options)
        turns = _draws.lognormvariate(0, SIGMA_TURNS) * MEDIAN_TURNS
        self._left = min(max(round(turns), 1), MOST_TURNS)
        return (Message("user", "Look."),), {}

    async def step(self, action: str) -> Any:  # type: ignore[override]
        self._left -= 1
        await asyncio.sleep(min(_draws.lognormvariate(0, SIGMA_S) * MEDIAN_S, MOST_S))
        return (Message("tool", "On."),), 0.0, self._left == 0, False, {}
