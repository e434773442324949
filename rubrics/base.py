"""What a rubric is, and how to ask one for a verdict without being hurt by it."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from numbers import Real
from typing import cast

from k2rl.types import Trajectory, Verdict
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

    @abstractmethod
    async def judge(self, trajectory: Trajectory) -> Verdict:
        """The verdict on a trajectory. Must not block the event loop, nor change the trajectory."""


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
        return _failed(rubric, trajectory, f"TimeoutError: no verdict within {deadline_s:g} s")
    except Exception as error:
        logger.debug("judging trajectory %s failed", trajectory.id, exc_info=error)
        return _failed(rubric, trajectory, f"{type(error).__name__}: {error}")
    return _sound(rubric, trajectory, verdict)


def _sound(rubric: Rubric, trajectory: Trajectory, verdict: object) -> Verdict:
    """The verdict in plain floats, or a failure if it is not what the rubric promised."""
    if not isinstance(verdict, Verdict):
        kind = type(verdict).__name__
        return _failed(rubric, trajectory, f"TypeError: judge returned {kind}, not a Verdict")
    if not verdict.ok:
        return verdict
    # A struct does not check its fields: whatever the rubric put there is looked at here.
    numbers: dict[str, object] = {"value": verdict.value, **verdict.components}
    for name, number in numbers.items():
        if not isinstance(number, Real) or not math.isfinite(number):
            return _failed(rubric, trajectory, f"ValueError: verdict {name} is {number}, not a finite number")
    value, (low, high) = float(cast("float", verdict.value)), rubric.reward_range
    if not low - RANGE_TOLERANCE <= value <= high + RANGE_TOLERANCE:
        reason = f"ValueError: the value {value:g} lies outside reward_range ({low:g}, {high:g})"
        return _failed(rubric, trajectory, reason)
    return Verdict.scored(value, {name: float(number) for name, number in verdict.components.items()})


def _failed(rubric: Rubric, trajectory: Trajectory, reason: str) -> Verdict:
    return Verdict.failed(f"{type(rubric).__name__} on trajectory {trajectory.id}: {reason}")
