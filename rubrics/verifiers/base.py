"""What judges that know what is right have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from k2rl.types import Evidence, Trajectory, Verdict
from rubrics.answers import PLACES, extract, final_text
from rubrics.base import Rubric


class TaskError(ValueError):
    """The task does not say what this judge needs: there is no score."""


class Verifier(Rubric):
    """Compares the answer of an episode's last turn with what `task.data[field]` says of the right one."""

    idempotent = True

    def __init__(self, field: str = "answer", place: str = "auto") -> None:
        """`place`: where the answer stands, see `rubrics.answers.extract`.

        Raises:
            ValueError: `place` is no such place.
        """
        if place not in PLACES:
            raise ValueError(f"place={place!r} is none of: {', '.join(PLACES)}")
        self.field, self.place = field, place

    @property
    def identity(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(self.settings().items()))
        return f"{type(self).__name__}({settings})"

    def settings(self) -> dict[str, Any]:
        """What its verdicts depend on besides the trajectory."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def content(self, trajectory: Trajectory) -> object:
        return [final_text(trajectory), trajectory.task.data.get(self.field)]

    async def judge(self, trajectory: Trajectory) -> Verdict:
        truth = self.truth(trajectory)
        answer = extract(final_text(trajectory), self.place)
        if answer is None:
            return Verdict.scored(0.0, evidence=[Evidence("no answer found", passed=False)])
        return await self.check(answer, truth)

    def truth(self, trajectory: Trajectory) -> Any:
        """What the task says.

        Raises:
            TaskError: it does not say it.
        """
        truth = trajectory.task.data.get(self.field)
        if truth is None or truth == "":
            raise TaskError(f"task {trajectory.task.id} has no {self.field!r} in its data")
        return truth

    @abstractmethod
    async def check(self, answer: str, truth: Any) -> Verdict:
        """The verdict on an answer.

        Raises:
            TaskError: what the task says makes no sense.
        """


def decided(right: bool, why: str, component: str = "") -> Verdict:
    """1 or 0, and why."""
    return Verdict.scored(float(right), evidence=[Evidence(why[:300], component, right)])
