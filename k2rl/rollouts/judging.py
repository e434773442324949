"""Judging episodes as they finish: each alone, or all responses to a task once the last of them has ended."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable

from k2rl.types import Trajectory, Verdict
from rubrics.base import Rubric, judge_safely
from rubrics.groups import judge_group_safely


class Judging:
    """Gives the trajectories of one batch their verdicts.

    A rubric that compares waits for whole groups: to be called outside of whatever bounds the episodes at
    once, or the last of a group would wait for the first. A response that is alone in its group, as in an
    evaluation, is judged by `alone`.
    """

    def __init__(self, rubric: Rubric, alone: Rubric, deadline_s: float, group_ids: Iterable[str]) -> None:
        """`group_ids`: of every episode that will come."""
        self._rubric, self._alone, self._deadline_s = rubric, alone, deadline_s
        self._sizes = Counter(group_ids)
        self._waiting: defaultdict[str, list[Trajectory]] = defaultdict(list)
        self._judged: dict[str, asyncio.Event] = {}

    async def at_once(self, trajectory: Trajectory) -> Verdict | None:
        """The verdict on an episode that is judged by itself; None for one that has a group to wait for."""
        if self._waits(trajectory):
            return None
        rubric = self._alone if self._rubric.needs_group else self._rubric
        return await judge_safely(rubric, trajectory, self._deadline_s)

    async def with_its_group(self, trajectory: Trajectory) -> None:
        """Once all of its group are here, give them their verdicts; whatever fails is a failed one."""
        if not self._waits(trajectory):
            return
        group = trajectory.group_id
        judged = self._judged.setdefault(group, asyncio.Event())
        members = self._waiting[group]
        members.append(trajectory)
        if len(members) < self._sizes[group]:
            await judged.wait()
            return
        members.sort(key=lambda member: member.id)  # whatever order they ended in
        verdicts = await judge_group_safely(self._rubric, members, self._deadline_s)
        for member, verdict in zip(members, verdicts, strict=True):
            member.verdict = verdict
        del self._waiting[group]
        judged.set()

    def _waits(self, trajectory: Trajectory) -> bool:
        return self._rubric.needs_group and self._sizes[trajectory.group_id] > 1
