from pathlib import Path
from typing import Any

import pytest

from k2rl.tracking.timeline import Phase, Timeline, read_timeline, span, sum_per_phase


def record(timeline: Timeline, clock: Any, *phases: tuple[str, int, float]) -> None:
    for name, step, seconds in phases:
        with timeline.phase(name, step):
            clock.now += seconds


def test_phases_are_kept_relative_to_the_start_of_the_run(tmp_path: Path, clock: Any) -> None:
    timeline = Timeline(tmp_path, clock=clock)
    clock.now += 3
    record(timeline, clock, ("rollout", 1, 5.0), ("train", 1, 2.5))
    assert read_timeline(tmp_path) == [Phase("rollout", 1, 3.0, 8.0), Phase("train", 1, 8.0, 10.5)]
    assert timeline.elapsed == 10.5
    timeline.close()


def test_a_phase_that_raises_is_recorded_too(tmp_path: Path, clock: Any) -> None:
    timeline = Timeline(tmp_path, clock=clock)

    def interrupted() -> None:
        with timeline.phase("train", 4):
            clock.now += 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    timeline.close()
    assert read_timeline(tmp_path) == [Phase("train", 4, 0.0, 1.0)]


def test_a_resumed_run_goes_on_where_the_kept_part_ended(tmp_path: Path, clock: Any) -> None:
    first = Timeline(tmp_path, clock=clock)
    record(first, clock, ("rollout", 1, 10.0), ("rollout", 2, 10.0), ("rollout", 3, 10.0))
    first.close()
    clock.now += 1000
    second = Timeline(tmp_path, resume_step=2, clock=clock)
    record(second, clock, ("start", 0, 4.0), ("rollout", 3, 6.0))
    second.close()
    assert [(p.phase, p.step, p.start, p.end) for p in read_timeline(tmp_path)] == [
        ("rollout", 1, 0.0, 10.0),
        ("rollout", 2, 10.0, 20.0),
        ("start", 0, 20.0, 24.0),
        ("rollout", 3, 24.0, 30.0),
    ]


def test_a_fresh_run_does_not_inherit_phases(tmp_path: Path, clock: Any) -> None:
    first = Timeline(tmp_path, clock=clock)
    record(first, clock, ("start", 0, 10.0))
    first.close()
    Timeline(tmp_path, clock=clock).close()
    assert read_timeline(tmp_path) == []


def test_sums_add_up_and_the_span_counts_overlaps_once() -> None:
    phases = [Phase("rollout", 1, 0, 10), Phase("judge", 1, 4, 12), Phase("rollout", 2, 15, 20)]
    assert sum_per_phase(phases) == {"rollout": 15, "judge": 8}
    assert span(phases[:2]) == 12
    assert span([]) == 0


def test_phases_of_a_step(tmp_path: Path, clock: Any) -> None:
    timeline = Timeline(tmp_path, clock=clock)
    record(timeline, clock, ("rollout", 1, 1.0), ("rollout", 2, 2.0), ("train", 2, 3.0))
    assert [phase.phase for phase in timeline.of_step(2)] == ["rollout", "train"]
    timeline.close()
