"""Judging the responses to one task together, for rubrics that compare them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from k2rl.types import Trajectory, Verdict
from rubrics.base import Rubric, judge_safely, not_judged, sound
from rubrics.deadline import MissedDeadlineError, within

logger = logging.getLogger(__name__)


async def judge_group_safely(
    rubric: Rubric, trajectories: Sequence[Trajectory], deadline_s: float
) -> list[Verdict]:
    """A verdict for each response to one task, as `judge_safely` gives them; the deadline is for all.

    Episodes that failed are not compared. One that is left alone has nothing to be compared with, and its
    verdict is failed.
    """
    if not rubric.needs_group:
        return list(await asyncio.gather(*(judge_safely(rubric, t, deadline_s) for t in trajectories)))
    live = [t for t in trajectories if t.stop_reason != "failed"]
    verdicts = dict(zip(map(id, live), await _judged(rubric, live, deadline_s), strict=True))
    return [
        verdicts[id(t)] if id(t) in verdicts else await judge_safely(rubric, t, deadline_s)
        for t in trajectories
    ]


async def _judged(rubric: Rubric, live: list[Trajectory], deadline_s: float) -> list[Verdict]:
    def all_failed(reason: str) -> list[Verdict]:
        return [not_judged(rubric, t, reason) for t in live]

    async def judge() -> list[Verdict]:
        return await rubric.judge_group(live)

    if len(live) < 2:
        return all_failed("no other response of its group to compare it with")
    try:
        verdicts = await within(deadline_s, judge())
    except MissedDeadlineError:
        return all_failed(f"TimeoutError: no verdicts within {deadline_s:g} s")
    # A plug-in may raise anything: it is these judgements' failure, and not a score.
    except Exception as error:
        logger.debug("judging group %s failed", live[0].group_id, exc_info=error)
        return all_failed(f"{type(error).__name__}: {error}")
    if not isinstance(verdicts, list) or len(verdicts) != len(live):
        return all_failed("TypeError: judge_group gave no list of one verdict a trajectory")
    return [sound(rubric, t, verdict) for t, verdict in zip(live, verdicts, strict=True)]
