"""What a rubric is, and how to ask one for a verdict without being hurt by it."""

from __future__ import annotations

import asyncio
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import cast

from k2rl.types import Evidence, Trajectory, Verdict
from rubrics.deadline import MissedDeadlineError, within

RANGE_TOLERANCE = 1e-6
"""How far rounding may carry a value out of its range: a sum of tenths is not exactly 1."""

logger = logging.getLogger(__name__)


class Rubric(ABC):
    """Turns a finished episode into a verdict.

    One rubric judges many trajectories at the same time, so `judge` keeps no state between calls.
    Give a low value only for a bad answer. Where no judgement can be reached (an unreachable judge,
    an unreadable reply), raise or return `Verdict.failed(reason)`: both are masked from the loss,
    never scored 0.
    """

    reward_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest value `judge` gives; anything outside counts as a failed judgement."""

    idempotent: bool = False
    """Whether asking again does no harm: only then is a judgement that failed tried again."""

    needs_group: bool = False
    """Whether it compares: then `judge_group` gets all responses to a task, and `judge` is not asked."""

    @property
    def identity(self) -> str:
        """All that its verdicts depend on but the trajectory; what is cached is cached under it."""
        return type(self).__name__

    @abstractmethod
    async def judge(self, trajectory: Trajectory) -> Verdict:
        """The verdict on a trajectory. Must not block the event loop, nor change the trajectory."""

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        """A verdict for each response to one task, in their order."""
        return list(await asyncio.gather(*map(self.judge, trajectories)))

    def content(self, trajectory: Trajectory) -> object:
        """What of a trajectory its verdict depends on, as JSON has it; None: its verdicts are not cached."""
        return None

    def parts(self) -> Sequence[Rubric]:
        """The rubrics that it asks in turn."""
        return ()

    async def close(self) -> None:
        """Put away what it holds; asked again, it takes it anew."""
        for part in self.parts():
            await part.close()


async def judge_safely(rubric: Rubric, trajectory: Trajectory, deadline_s: float) -> Verdict:
    """The rubric's verdict, or `Verdict.failed` with the reason if there is no sound one in time.

    An exception, a missed deadline, something cancelled inside the judge, a value outside
    `rubric.reward_range`, NaN, infinity and anything that is no verdict become failures that name the
    rubric and the trajectory. The verdict of an episode that failed stays a failure, and the rubric is
    not asked.

    Raises:
        asyncio.CancelledError: if the caller is cancelled; the judge is cancelled with it.
    """
    if trajectory.stop_reason == "failed":
        if trajectory.verdict is not None and not trajectory.verdict.ok:
            return trajectory.verdict
        return Verdict.failed(f"trajectory {trajectory.id} failed before it could be judged")

    async def judge() -> Verdict:
        return await rubric.judge(trajectory)

    try:
        verdict = await within(deadline_s, judge())
    except MissedDeadlineError:
        return not_judged(rubric, trajectory, f"TimeoutError: no verdict within {deadline_s:g} s")
    except Exception as error:
        logger.debug("judging trajectory %s failed", trajectory.id, exc_info=error)
        return not_judged(rubric, trajectory, f"{type(error).__name__}: {error}")
    return sound(rubric, trajectory, verdict)


def sound(rubric: Rubric, trajectory: Trajectory, verdict: object) -> Verdict:
    """The verdict in plain floats, or a failure if it is not what the rubric promised."""
    if not isinstance(verdict, Verdict):
        kind = type(verdict).__name__
        return not_judged(rubric, trajectory, f"TypeError: judge returned {kind}, not a Verdict")
    if not verdict.ok:
        return verdict
    # A struct does not check its fields: whatever the rubric put there is looked at here.
    weighed = {f"weight of {name}": weight for name, weight in verdict.weights.items()}
    numbers: dict[str, object] = {"value": verdict.value, **verdict.components, **weighed}
    for name, number in numbers.items():
        if not isinstance(number, Real) or not math.isfinite(number):
            return not_judged(
                rubric, trajectory, f"ValueError: verdict {name} is {number}, not a finite number"
            )
    if not all(isinstance(item, Evidence) for item in verdict.evidence):
        return not_judged(rubric, trajectory, "TypeError: evidence is no sequence of Evidence")
    value, (low, high) = float(cast("float", verdict.value)), rubric.reward_range
    if not low - RANGE_TOLERANCE <= value <= high + RANGE_TOLERANCE:
        reason = f"ValueError: the value {value:g} lies outside reward_range ({low:g}, {high:g})"
        return not_judged(rubric, trajectory, reason)
    components = {name: float(number) for name, number in verdict.components.items()}
    weights = {name: float(number) for name, number in verdict.weights.items()}
    return Verdict.scored(value, components, weights, verdict.evidence, verdict.judge)


def not_judged(rubric: Rubric, trajectory: Trajectory, reason: str) -> Verdict:
    """A failed verdict that names the rubric and the trajectory."""
    return Verdict.failed(f"{type(rubric).__name__} on trajectory {trajectory.id}: {reason}")
