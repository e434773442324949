"""Fitting a sheet to measured pushes; the machine's speed is no part of these tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from k2rl.checkpoint_engine.calibrate import Record, errors, fit, measure_pushes, plans_to_measure, predict
from k2rl.checkpoint_engine.cells import CELL_BYTES
from k2rl.checkpoint_engine.local_push import LocalPushes, micro_measurements
from k2rl.checkpoint_engine.sheets import load_sheet, write_sheet
from k2rl.checkpoint_engine.topology import Topology
from k2rl.config import DeviceConfig

GUESS = DeviceConfig(copy_in_gbps=5, apply_gbps=5, memory_gbps=10, block_us=2, bucket_us=200, push_ms=1)
MIB = 2**20


@pytest.mark.parametrize(("copy_in", "apply", "block_us"), [(2.0, 9.0, 12.0), (8.0, 3.0, 0.5)])
def test_a_fit_predicts_pushes_it_has_not_seen(copy_in: float, apply: float, block_us: float) -> None:
    truth = replace(GUESS, copy_in_gbps=copy_in, apply_gbps=apply, block_us=block_us, memory_gbps=30)
    topology = Topology(GUESS, 1)
    to_fit, held_out = plans_to_measure(64 * MIB)
    wobble = [1 + 0.02 * (number % 3 - 1) for number in range(len(to_fit))]
    records = [
        Record(plan, topology, predict(Record(plan, topology, 1.0), truth) * off)
        for plan, off in zip(to_fit, wobble, strict=True)
    ]
    others = [Record(plan, topology, predict(Record(plan, topology, 1.0), truth)) for plan in held_out]
    fitted = fit(records, GUESS)
    assert fitted.worst < 0.1
    assert max(map(abs, errors(others, fitted.device))) < 0.15


def test_what_the_records_cannot_tell_stays_at_the_guess() -> None:
    topology = Topology(GUESS, 1)
    plan = plans_to_measure()[0][0]
    fitted = fit([Record(plan, topology, predict(Record(plan, topology, 1.0), GUESS))], GUESS)
    assert fitted.device == GUESS


@pytest.mark.parametrize("seconds", [[], [0.0]])
def test_a_fit_to_nothing_is_refused(seconds: list[float]) -> None:
    records = [Record(plans_to_measure()[0][0], Topology(GUESS, 1), took) for took in seconds]
    with pytest.raises(ValueError, match="needs measured pushes"):
        fit(records, GUESS)


def test_the_measurement_is_a_function_and_its_first_turn_only_warms_up() -> None:
    plans = plans_to_measure()[0][:2]
    asked: list[int] = []

    def push(plan: object) -> float:
        asked.append(plans.index(plan))  # type: ignore[arg-type]
        return 100.0 if len(asked) <= 2 else float(len(asked))

    records = measure_pushes(plans, Topology(GUESS, 1), push, repeats=3)
    assert asked == [0, 1] * 4
    assert [record.seconds for record in records] == [5.0, 6.0]


def test_a_local_push_is_measured() -> None:
    plans = plans_to_measure(2 * MIB)[0][3:]
    with LocalPushes() as local:
        for plan in (*plans, plans[0]):
            assert 0 < local.push(plan) < 30


def test_a_local_delta_is_what_has_changed() -> None:
    full = msgspec.structs.replace(plans_to_measure(2 * MIB)[0][4], cell_bytes=CELL_BYTES)
    name = full.tensors[0].name
    with LocalPushes() as local:
        local.push(full)
        for changed, nbytes in (({name: [(CELL_BYTES + 1, CELL_BYTES + 3)]}, CELL_BYTES), ({}, 0)):
            seconds, plan = local.push_changed(full, changed)
            assert 0 < seconds < 30
            assert (plan.strategy, plan.nbytes) == ("delta", nbytes)
        everything = {name: [(0, full.tensors[0].rows)]}
        assert local.push_changed(full, everything)[1] == full


def test_micro_measurements_give_a_sheet_that_can_be_written_and_read(tmp_path: Path) -> None:
    guess = micro_measurements(MIB)
    write_sheet(guess, tmp_path / "here" / "cpu.yaml", "measured")
    assert load_sheet(str(tmp_path / "here" / "cpu.yaml"), {}).copy_in_gbps == pytest.approx(
        guess.copy_in_gbps, abs=0.1
    )
