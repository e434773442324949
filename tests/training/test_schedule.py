"""Learning rates rise, stay and fall as is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2rl.config import ScheduleConfig
from k2rl.training.schedule import learning_rate


def rates(schedule: ScheduleConfig, steps: int, peak: float = 1.0) -> list[float]:
    return [learning_rate(peak, schedule, step, steps) for step in range(1, steps + 1)]


def test_constant_is_constant_after_its_warm_up() -> None:
    assert rates(ScheduleConfig("constant", warmup_steps=4), 6, 2.0) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_falls_by_equal_steps_to_its_end() -> None:
    assert rates(ScheduleConfig("linear", end=0.2), 4) == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_cosine_falls_slowly_at_both_ends() -> None:
    found = rates(ScheduleConfig("cosine", end=0.0), 4)
    assert found == pytest.approx([(1 + c) / 2 for c in (0.5**0.5, 0.0, -(0.5**0.5), -1.0)])


def test_it_may_stay_at_its_peak_before_it_falls() -> None:
    found = rates(ScheduleConfig("linear", warmup_steps=2, decay_from=0.6, end=0.5), 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5])


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
    decay_from=st.floats(0, 1),
    end=st.floats(0, 1),
    steps=st.integers(1, 40),
)
def test_it_rises_once_and_falls_once(
    name: str, warmup: int, decay_from: float, end: float, steps: int
) -> None:
    warmup = min(warmup, steps)
    found = rates(ScheduleConfig(name, warmup, decay_from, end), steps)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert all(before >= after - 1e-12 for before, after in zip(found[top:], found[top + 1 :], strict=False))
    assert all(-1e-12 <= rate <= 1 for rate in found)
    if name != "constant" and steps > max(warmup, round(decay_from * steps)):
        assert found[-1] == pytest.approx(end)
