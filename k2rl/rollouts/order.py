"""Which episode is played next: the one that is expected to be the longest, so that none is begun last.

Pure bookkeeping. What is expected of a group is the mean of its siblings that are over; else of the episodes
of its task, of its kind, or of all.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from k2rl.rollouts.groups import Group
from k2rl.types import Task, Trajectory

#: Weight of the newest length in the mean that is kept of a task, a kind and all.
NEWEST = 0.1


class Lengths:
    """Mean sampled tokens of finished episodes, by task, by kind and of all; the newest count most."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str], float] = {}

    def add(self, trajectory: Trajectory) -> None:
        for key in _keys(trajectory.task):
            before = self._means.get(key)
            length = float(trajectory.num_sampled)
            self._means[key] = length if before is None else before + NEWEST * (length - before)

    def expected(self, task: Task) -> float:
        """Of an episode of this task; 0 where nothing is known."""
        return next((self._means[key] for key in _keys(task) if key in self._means), 0.0)


def _keys(task: Task) -> tuple[tuple[str, str], ...]:
    return ("task", task.id), ("kind", task.kind), ("all", "")


class Queue:
    """Groups with episodes that wait for a seat."""

    def __init__(self, lengths: Lengths, longest_first: bool) -> None:
        """Without `longest_first` they come in the order in which they were pushed."""
        self._lengths = lengths
        self._longest_first = longest_first
        self._numbers = itertools.count()
        self._heap: list[tuple[int, float, int, Group]] = []
        #: The entry of each group that is valid.
        self._entries: dict[str, int] = {}
        self._places: dict[str, int] = {}

    def push(self, group: Group, first: bool = False) -> None:
        """Enter a group, or enter it anew with what is known now."""
        if not group.pending:
            return
        place = self._places.setdefault(group.id, next(self._numbers))
        number = self._entries[group.id] = next(self._numbers)
        begun = any(episode.trajectory is not None for episode in group.pending)
        rank = 0 if first else 1 if begun else 2
        order = -self._expected(group) if self._longest_first else float(place)
        heapq.heappush(self._heap, (rank, order, number, group))

    def hurry(self, groups: Sequence[Group]) -> None:
        for group in groups:
            self.push(group, first=True)

    def remove(self, group: Group) -> None:
        self._entries.pop(group.id, None)
        self._places.pop(group.id, None)

    def pop(self, has_room: Callable[[Group], bool]) -> Group | None:
        """The first group that there is room for; it is in the queue no more."""
        passed, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            group = entry[-1]
            if self._entries.get(group.id) != entry[2] or not group.pending:
                continue
            if has_room(group):
                found = group
            else:
                passed.append(entry)
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if found is not None:
            self._entries.pop(found.id)
        return found

    def _expected(self, group: Group) -> float:
        known = [t.num_sampled for t in group.finished.values() if not t.failed]
        return sum(known) / len(known) if known else self._lengths.expected(group.task)
