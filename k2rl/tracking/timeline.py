"""When each phase of a run began and ended."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from k2rl.tracking.jsonl import JsonlWriter, read_jsonl, rewind_jsonl

FILE = "timeline.jsonl"


class Phase(msgspec.Struct, frozen=True):
    """One phase; `start` and `end` are seconds since the run began, step 0 is what comes before RL."""

    phase: str
    step: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """Records phases to `timeline.jsonl` in `directory`, and is the clock of the run.

    With `resume_step` the phases of later steps are dropped and the clock goes on from the end of
    the last one kept, as if the run had not stopped.
    """

    def __init__(
        self,
        directory: Path,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        path = directory / FILE
        self._phases: list[Phase] = []
        if resume_step is not None:
            self._phases = rewind_jsonl(path, Phase, lambda phase: phase.step <= resume_step)
        self._writer = JsonlWriter(path, append=resume_step is not None)
        self._clock = clock
        self._origin = clock() - max((phase.end for phase in self._phases), default=0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._origin

    @contextmanager
    def phase(self, name: str, step: int = 0) -> Iterator[None]:
        """Record the enclosed block as phase `name` of `step`, also when it raises."""
        start = self.elapsed
        try:
            yield
        finally:
            record = Phase(name, step, round(start, 4), round(self.elapsed, 4))
            self._phases.append(record)
            self._writer.write(record)

    def of_step(self, step: int) -> list[Phase]:
        """The phases of `step` recorded so far, in the order they ended."""
        return [phase for phase in self._phases if phase.step == step]

    def close(self) -> None:
        self._writer.close()


def read_timeline(path: Path) -> list[Phase]:
    """The phases in `path` (a `timeline.jsonl` or its folder); none if there is no such file."""
    return read_jsonl(path / FILE if path.is_dir() else path, Phase)


def sum_per_phase(phases: Iterable[Phase]) -> dict[str, float]:
    """Total seconds of each phase, in order of first appearance."""
    totals: defaultdict[str, float] = defaultdict(float)
    for phase in phases:
        totals[phase.phase] += phase.seconds
    return dict(totals)


def span(phases: Iterable[Phase]) -> float:
    """Seconds from the first start to the last end; 0 for no phases. Overlaps count once."""
    phases = list(phases)
    if not phases:
        return 0.0
    return max(phase.end for phase in phases) - min(phase.start for phase in phases)
