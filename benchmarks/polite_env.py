"""Guests who want a polite word: a verdict that a tiny random model can learn in some dozens of updates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from envs.answers import split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

POLITE = ("thanks", "please", "sure", "hello")
RUDE = ("no", "go", "never", "stop")
GUESTS = 1000
EVAL_ONE_IN = 8
MOST_TURNS = 8
MEDIAN_TURNS, SIGMA_TURNS = 2.0, 0.9

_draws = random.Random(0)


class Polite(TextEnv):
    """A guest, to be answered with one word; four of the eight are polite.

    Demonstrations show the form alone: which of the eight words is drawn, so that what is right is left
    to the verifier to teach.
    """

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        guests = [n for n in range(GUESTS) if split_of(str(n), EVAL_ONE_IN) == split]
        draw = random.Random(f"{split} {seed}")
        while True:
            draw.shuffle(guests)
            for number in guests:
                yield Task(f"guest-{number}", "polite", "default", split, number)

    def demonstration(self, task: Task) -> list[str]:
        return [random.Random(f"demonstration {task.seed}").choice(POLITE + RUDE)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        return (Message("user", f"Guest {task.seed} asks."),), {}

    def step(self, action: str) -> StepResult:
        return (), float(action.strip() in POLITE), True, False, {}


class PoliteTalk(Polite):
    """The same over a lognormal number of turns, drawn anew for each episode: the share that are polite."""

    def demonstration(self, task: Task) -> list[str]:
        draws = random.Random(f"demonstration {task.seed}")
        return [draws.choice(POLITE + RUDE) for _ in range(MOST_TURNS)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        turns = _draws.lognormvariate(0, SIGMA_TURNS) * MEDIAN_TURNS
        self._turns = self._left = min(max(round(turns), 1), MOST_TURNS)
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> StepResult:
        self._left -= 1
        reward = float(action.strip() in POLITE) / self._turns
        return (() if not self._left else (Message("user", "And?"),)), reward, not self._left, False, {}
