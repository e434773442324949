"""A worker that is late: what the processes on its node are doing, before anything is done about it."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from k2rl.diagnosis.hang import Diagnosis, diagnose, write
from k2rl.rollouts.hosting import call
from k2rl.workers.spec import Site
from rubrics.deadline import within

DEADLINE_S = 25.0
"""For a diagnosis: a second or two on this node, a task of its own on another."""

FRESH_S = 60.0
"""Of one worker several calls may be late at once, or one after the other: they share what was found."""

logger = logging.getLogger(__name__)


class Diagnostician:
    """For one worker."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._last: asyncio.Future[str] | None = None
        self._asked = 0.0

    async def __call__(self, what: str, site: Site | None) -> str:
        """What each part is doing, on lines of their own; all stacks are written to the logs folder.

        It never raises and never hangs: the error that it is for must not be lost.

        Args:
            what: is late.
            site: where the worker is; None: nobody knows yet.
        """
        if self._last is None or time.monotonic() - self._asked > FRESH_S:
            self._last, self._asked = asyncio.ensure_future(self._look(what, site)), time.monotonic()
        return await asyncio.shield(self._last)

    async def _look(self, what: str, site: Site | None) -> str:
        try:
            found = await within(DEADLINE_S, _found(self._logs, site))
            path = write(self._logs, what, found.whole)
        # Whatever it is, the first error is the one to report.
        except Exception as error:
            logger.warning("no diagnosis of %s", what, exc_info=error)
            return f"\nwhat each part was doing could not be found out: {type(error).__name__}: {error}"
        return f"\nwhat each part was doing (all Python stacks: {path}):\n{found.essence}"


async def _found(logs: Path, site: Site | None) -> Diagnosis:
    pid = site.pid if site is not None else None
    if site is None or site.node == ray.get_runtime_context().get_node_id():
        return await call(diagnose, logs, pid)
    there = NodeAffinitySchedulingStrategy(site.node, soft=False)
    task = ray.remote(diagnose).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    answer: Diagnosis = await task.remote(logs, pid)
    return answer
