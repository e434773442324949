"""The event simulation itself: bytes are conserved, rates are kept, and sharing is fair."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.flows import Task, simulate_tasks

LINKS = ("a", "b", "c")


@st.composite
def workloads(draw: st.DrawFn) -> tuple[list[Task], dict[str, float]]:
    rates = {link: draw(st.floats(1, 1000)) for link in LINKS}
    tasks: list[Task] = []
    for number in range(draw(st.integers(1, 25))):
        after = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        tasks.append(
            Task(
                "stage",
                f"lane {draw(st.integers(0, 4))}",
                tuple(sorted(after)),
                draw(st.sampled_from([0.0, 0.1])),
                draw(st.sampled_from([0.0, 1.0, 50.0, 1e4])),
                tuple(sorted(draw(st.sets(st.sampled_from(LINKS), min_size=1)))),
                draw(st.sampled_from([0.0, 0.5])),
            )
        )
    return tasks, rates


@given(workloads())
@settings(max_examples=25, deadline=None)
def test_links_carry_every_byte_and_no_more_than_their_rate(
    workload: tuple[list[Task], dict[str, float]],
) -> None:
    tasks, rates = workload
    spans, traffic = simulate_tasks(tasks, rates)
    end = max(span.end for span in spans)
    for link, used in traffic.items():
        expected = sum(task.nbytes for task in tasks if link in task.links)
        assert used.nbytes == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert used.peak <= rates[link] * (1 + 1e-9)
        assert used.nbytes <= rates[link] * end * (1 + 1e-9) + 1e-6


@given(workloads())
@settings(max_examples=25, deadline=None)
def test_nothing_starts_early_and_lanes_do_one_thing_at_a_time(
    workload: tuple[list[Task], dict[str, float]],
) -> None:
    tasks, rates = workload
    spans, _ = simulate_tasks(tasks, rates)
    free: dict[str, float] = {}
    for task, span in zip(tasks, spans, strict=True):
        slack = 1e-9 * (1 + span.end)
        assert span.start >= free.get(task.lane, 0.0) - slack
        assert all(span.start >= spans[other].done - slack for other in task.after)
        alone = task.setup + task.nbytes / min(rates[link] for link in task.links)
        assert span.end - span.start >= alone * (1 - 1e-9) - slack
        assert span.done == pytest.approx(span.end + task.latency)
        free[task.lane] = span.end


def test_flows_share_a_link_fairly_and_take_what_others_cannot_use() -> None:
    tasks = [
        Task("s", "x", (), nbytes=10, links=("a", "slow")),
        Task("s", "y", (), nbytes=90, links=("a",)),
    ]
    spans, _ = simulate_tasks(tasks, {"a": 10.0, "slow": 1.0})
    assert spans[0].end == pytest.approx(10)  # held at 1 by its slow link
    assert spans[1].end == pytest.approx(10)  # the other 9 of 10


def test_a_task_that_waits_for_a_later_one_is_refused() -> None:
    with pytest.raises(ValueError, match="waits for a later one"):
        simulate_tasks([Task("s", "x", (0,))], {})
