"""A suite, played: many episodes at once, within budgets, and none twice that was finished before."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime

from k2rl.errors import RunError
from k2rl.evaluation.policies import Policy
from k2rl.evaluation.suite_episodes import EpisodeCache, EpisodeRecord, cache_key, play
from k2rl.evaluation.suite_options import SuiteOptions
from k2rl.evaluation.suite_results import SuiteResults, per_tag, score
from k2rl.evaluation.suites import Suite
from k2rl.types import Task

Progress = Callable[[int, int], None]


class SuiteRun:
    """Plays what a suite asks for with one policy; `records` holds what is finished, whatever happens."""

    def __init__(
        self,
        suite: Suite,
        options: SuiteOptions,
        policy: Policy,
        cache: EpisodeCache | None,
        progress: Progress = lambda done, planned: None,
    ) -> None:
        self._suite, self._options, self._policy = suite, options, policy
        self._cache = cache if policy.identity is not None else None
        self._progress = progress
        self._started = datetime.now().astimezone()
        self._clock = time.monotonic()
        self._records: dict[tuple[str, int], EpisodeRecord] = {}
        self._planned = [(task, sample) for sample in range(options.samples) for task in suite.tasks]
        self._spent = self._reused = 0
        self._stopped_by = ""

    @property
    def records(self) -> list[EpisodeRecord]:
        """What is finished, in the order of the tasks."""
        order = {task.id: place for place, task in enumerate(self._suite.tasks)}
        return sorted(self._records.values(), key=lambda record: (order[record.task], record.sample))

    async def run(self) -> SuiteResults:
        """Play everything that budgets allow.

        Raises:
            RunError: the model cannot be asked any more; what was finished before is in the cache.
        """
        places = iter(self._planned)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._options.parallel, len(self._planned))):
                    group.create_task(self._work(places))
        except* RunError as errors:
            raise errors.exceptions[0] from None
        if len(self._records) < len(self._planned) and not self._stopped_by:
            # Less than all must never look like all.
            raise RunError(
                f"{len(self._planned) - len(self._records)} of {len(self._planned)} answers are missing, and "
                "nothing says why: something cancelled what played them"
            )
        return self.results()

    async def _work(self, places: Iterator[tuple[Task, int]]) -> None:
        for task, sample in places:
            key = self._key(task, sample)
            record = self._cache.get(key) if self._cache is not None else None
            if record is not None:
                self._reused += 1
            elif self._exhausted():
                continue
            else:
                record = await play(self._suite, task, sample, self._policy, self._options.episode_s)
                self._spent += record.completion_tokens
                if self._cache is not None:
                    self._cache.put(key, record)
            self._records[task.id, sample] = record
            self._progress(len(self._records), len(self._planned))

    def _exhausted(self) -> bool:
        """Whether a budget is used up; what was finished in an earlier run costs nothing."""
        options = self._options
        if options.token_budget and self._spent >= options.token_budget:
            self._stopped_by = f"token_budget={options.token_budget}"
        elif options.minutes and time.monotonic() - self._clock >= 60 * options.minutes:
            self._stopped_by = f"minutes={options.minutes:g}"
        return bool(self._stopped_by)

    def _key(self, task: Task, sample: int) -> str:
        options = self._options
        sampling: Sequence[object] = (options.temperature, options.max_tokens, options.seed, options.sandbox)
        return cache_key(self._suite, task, sample, str(self._policy.identity), sampling)

    def results(self) -> SuiteResults:
        """Of what is finished."""
        records, ks = self.records, self._options.ks
        return SuiteResults(
            suite=self._suite.name,
            model=self._options.model + (f" {self._options.name}" if self._options.name else ""),
            started=self._started.isoformat(timespec="seconds"),
            options=asdict(self._options),
            digest=self._suite.digest,
            planned=len(self._planned),
            played=len(records),
            overall=score(records, ks),
            per_tag=per_tag(records, ks),
            stopped_by=self._stopped_by,
            prompt_tokens=sum(record.prompt_tokens for record in records),
            completion_tokens=sum(record.completion_tokens for record in records),
            seconds=round(time.monotonic() - self._clock, 3),
            reused=self._reused,
            failures=dict(
                Counter(record.failure[:200] for record in records if record.failure).most_common(10)
            ),
        )
