"""Episodes for judges, and judging them."""

from __future__ import annotations

import asyncio
from typing import Any

from k2rl.types import Message, Task, ToolCall, Trajectory, Verdict
from rubrics.base import Rubric, judge_safely


def episode(turn: str = "", id: str = "e", calls: tuple[ToolCall, ...] = (), **data: Any) -> Trajectory:
    """An episode whose last turn is `turn`, to a task with this data."""
    prompt = str(data.get("prompt", "Answer the question."))
    task = Task(id=f"task-{id}", env="test", kind="default", split="train", seed=0, data=data)
    messages = [Message("user", prompt), Message("assistant", turn, calls)]
    return Trajectory(id=id, group_id="group", task=task, temperature=1.0, messages=messages)


def judged(judge: Rubric, turn: str = "", deadline_s: float = 60.0, /, **data: Any) -> Verdict:
    return asyncio.run(judge_safely(judge, episode(turn, **data), deadline_s))
