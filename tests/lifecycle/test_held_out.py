"""Held-out texts are measured once before the first step and once after each, however often a run begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2rl.errors import RunError
from k2rl.tracking.metrics import read_metrics, series
from k2rl.training.batch import SupervisedSequence
from tests.lifecycle.conftest import Story, die, fail
from tests.lifecycle.test_endings import WARM

TEXTS = [SupervisedSequence((1, 2), (False, True))]
# What the fake worker says of weights that are a number.
FOUND = [(step, pytest.approx(1 / (1 + WARM + step))) for step in (0, 1, 2)]


@pytest.fixture
def tracked(story: Story) -> Story:
    story.prepared = replace(story.prepared, held_out=TEXTS)
    return story


def test_the_texts_are_measured_after_the_update_and_before_vllm_has_its_turn(tracked: Story) -> None:
    calls = tracked.play().calls
    assert series(read_metrics(tracked.run_dir), "ptx/held_out_nll") == FOUND
    assert calls[calls.index("policy_step 1") :][:3] == ["policy_step 1", "nll 2", "publish 3"]
    assert calls.count("nll 3") == 1


@pytest.mark.parametrize("call", ["nll 1", "nll 2", "policy_step 2", "nll 3"])
def test_a_death_in_between_leaves_one_measure_a_step(tracked: Story, call: str) -> None:
    tracked.play({call: die}, restarts=1)
    assert series(read_metrics(tracked.run_dir), "ptx/held_out_nll") == FOUND


@pytest.mark.parametrize("call", ["nll 1", "policy_step 1", "nll 3"])
def test_a_resumed_run_goes_on_measuring(tracked: Story, call: str) -> None:
    with pytest.raises(RunError):
        tracked.play({call: fail})
    tracked.play(resume=True)
    assert series(read_metrics(tracked.run_dir), "ptx/held_out_nll") == FOUND


def test_without_texts_nothing_is_measured(story: Story) -> None:
    assert not any(call.startswith("nll") for call in story.play().calls)
    assert [row["step"] for row in read_metrics(story.run_dir)] == [1, 2]
