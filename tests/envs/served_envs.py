"""Environments that are served in tests, well and badly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task, Trajectory, Verdict
from rubrics.base import Rubric


class Shouted(Rubric):
    reward_range = (-1.0, 2.0)

    async def judge(self, trajectory: Trajectory) -> Verdict:
        last = [message.content for message in trajectory.messages if message.role == "assistant"][-1]
        return Verdict.scored(2.0 if last.isupper() else -1.0, {"length": float(len(last))})


class Moody(TextEnv):
    """Does what the policy says: `raise`, `hang`, `nonsense`, `end`; else it answers."""

    kinds = ("calm", "wild")

    def __init__(self, greeting: str = "Well?") -> None:
        super().__init__()
        self.greeting = greeting

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        for number in count():
            yield Task(
                f"{split}-{seed}-{number}", "moody", self.kinds[number % 2], split, number, {"n": number}
            )

    def demonstration(self, task: Task) -> list[str]:
        return ["hello", "end"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        if task.data.get("hang"):
            threading.Event().wait()
        return (Message("user", f"{self.greeting} {task.id}"),), {"task": task, "secret": object()}

    def step(self, action: str) -> StepResult:
        if action == "raise":
            raise OSError("the database is gone")
        if action == "hang":
            threading.Event().wait()
        if action == "nonsense":
            return "great"  # type: ignore[return-value]
        done = action == "end"
        info = {"reward_components": {"said": 1.0}}
        return (Message("user", f"You said {action}."),), 0.25, done, False, info


class Judged(Moody):
    """With a rubric of its own."""

    rubric = Shouted()


class Forgetful(Moody):
    """Gives what are no tasks, and no messages."""

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        yield "task"  # type: ignore[misc]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        return ("hello",), {}  # type: ignore[return-value]
