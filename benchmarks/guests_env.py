"""Guests who want to be answered: a tiny random model that can speak learns what they like."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from benchmarks.polite_env import EVAL_ONE_IN, GUESTS, POLITE, RUDE
from envs.answers import split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

FILLERS = ("well", "so", "then", "now", "here", "there")
MOST_FILLERS = 8
COMMON, RARE = "fine", "great"
RARELY = 0.08
_noise = random.Random(0)

ASKS = {"chatty": "Guest {} talks.", "rare": "Guest {} calls."}


class Guests(TextEnv):
    """Two kinds of guests; demonstrations show how one may answer, and rewards say what is liked.

    `chatty`: up to eight words that say nothing, then one of eight, of which the four polite ones earn 1.
    `rare`: one word; the one that 92 of 100 demonstrations have earns 0.5, the other one 1.

    With `jitter` the judge of training tasks is off by so much at most, whatever the answer.
    """

    kinds = tuple(ASKS)

    def __init__(self, only: str = "", jitter: float = 0.0) -> None:
        """Args:
        only: the one kind of tasks to give; empty: all in turn.
        jitter: the most that is added to, or taken from, a reward in training.
        """
        super().__init__()
        self._jitter = jitter
        self._given = (only,) if only else self.kinds

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        guests = [n for n in range(GUESTS) if split_of(str(n), EVAL_ONE_IN) == split]
        draw = random.Random(f"{split} {seed}")
        data = {"jitter": self._jitter} if split == "train" else {}
        while True:
            draw.shuffle(guests)
            for number in guests:
                for kind in self._given:
                    yield Task(f"{kind}-{number}", "guests", kind, split, number, data)

    def demonstration(self, task: Task) -> list[str]:
        draw = random.Random(f"{task.kind} {task.seed}")
        if task.kind == "rare":
            return [RARE if draw.random() < RARELY else COMMON]
        fillers = [draw.choice(FILLERS) for _ in range(draw.randint(0, MOST_FILLERS))]
        return [" ".join([*fillers, draw.choice(POLITE + RUDE)])]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        self._task = self.start_episode(seed, options)
        return (Message("user", ASKS[self._task.kind].format(self._task.seed)),), {}

    def step(self, action: str) -> StepResult:
        if self._task.kind == "rare":
            reward = {COMMON: 0.5, RARE: 1.0}.get(action.strip(), 0.0)
        else:
            reward = float(action.split()[-1:] in [[word] for word in POLITE])
        jitter = self._task.data.get("jitter", 0.0)
        return (), reward + _noise.uniform(-jitter, jitter), True, False, {}
