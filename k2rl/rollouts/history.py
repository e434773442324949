"""What earlier episodes tell about tasks: how long they take, how often they succeed."""

from __future__ import annotations

from k2rl.config import Config
from k2rl.types import Task, Trajectory

#: Weight of the newest value in the mean that is kept of a task, a kind and all.
NEWEST = 0.1


class Means:
    """Means of a number by task, by kind and of all; the newest values count most."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str], float] = {}

    def add(self, task: Task, value: float) -> None:
        for key in _keys(task):
            before = self._means.get(key)
            self._means[key] = value if before is None else before + NEWEST * (value - before)

    def expected(self, task: Task, unknown: float) -> float:
        """Of an episode of this task: its own mean, else its kind's, else that of all; else `unknown`."""
        return next((self._means[key] for key in _keys(task) if key in self._means), unknown)


def _keys(task: Task) -> tuple[tuple[str, str], ...]:
    return ("task", task.id), ("kind", task.kind), ("all", "")


class History:
    """Of a run's training episodes that have ended well; a resumed run reads it from its recordings."""

    def __init__(self, config: Config) -> None:
        self._correct_above = config.budget.correct_above
        #: Sampled tokens.
        self.lengths = Means()
        #: 1 where the reward was above `budget.correct_above`, else 0.
        self.success = Means()

    def add(self, trajectory: Trajectory) -> None:
        if not trajectory.failed:
            self.lengths.add(trajectory.task, float(trajectory.num_sampled))
            self.success.add(trajectory.task, float(trajectory.reward > self._correct_above))
