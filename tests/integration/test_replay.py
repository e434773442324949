"""Recorded rollouts: played without a trainer, trained on without vLLM, and bit for bit as often as one likes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from k2rl.rollouts.recording import recorded_steps
from k2rl.tracking.metrics import read_metrics
from k2rl.training.checkpoint import checkpoints
from tests.integration.conftest import Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("tiny_run")]

Start = Callable[..., Command]
STEPS = 10


def run_folder(tmp_path: Path) -> Path:
    (folder,) = (path.parent for path in tmp_path.glob("outputs/tiny/*/metrics.jsonl"))
    return folder


def trained(start: Start, cwd: Path, rollouts: Path, *overrides: str) -> Path:
    cwd.mkdir()
    code, _, err = start(
        *("train", "experiment=tiny", "debug=train_only", f"debug.rollouts={rollouts}", *overrides), cwd=cwd
    ).finish()
    assert code == 0, err
    return run_folder(cwd)


def assert_same_model(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_training_on_a_run_s_rollouts_makes_its_model_again(
    start: Start, tmp_path: Path, tiny_run: Path
) -> None:
    again = trained(start, tmp_path / "again", tiny_run, "seed=1", "model.dtype=float32")
    assert_same_model(again, tiny_run)
    ours, theirs = read_metrics(again), read_metrics(tiny_run)
    for name in ("reward/mean", "train/loss", "train/grad_norm", "mismatch/mean_abs_gap"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    assert not any(name.startswith(("publish/", "rollout/tokens_per_second")) for name in ours[0])


def test_a_killed_and_resumed_training_ends_with_the_same_bits(start: Start, tmp_path: Path) -> None:
    played = tmp_path / "played"
    played.mkdir()
    code, out, err = start(
        "train", "experiment=tiny", "debug=rollout_only", f"train.steps={STEPS}", cwd=played
    ).finish()
    assert code == 0, err
    recorded = run_folder(played)
    assert recorded_steps(recorded) == list(range(1, STEPS + 1))
    assert f"rollouts: {recorded / 'rollouts'}" in out
    assert not (recorded / "model").exists()
    assert [row["rollout/episodes"] for row in read_metrics(recorded)] == [8] * STEPS

    whole = trained(start, tmp_path / "whole", recorded, f"train.steps={STEPS}", "train.checkpoint_every=1")
    cut = tmp_path / "cut"
    cut.mkdir()
    command = start(
        *("train", "experiment=tiny", "debug=train_only", f"debug.rollouts={recorded}"),
        *(f"train.steps={STEPS}", "train.checkpoint_every=1"),
        cwd=cut,
    )
    wait_for(
        lambda: any(step for path in cut.glob("outputs/tiny/*") for step, _ in checkpoints(path)), "a step"
    )
    command.look()
    os.kill(command.process.pid, signal.SIGKILL)
    command.finish(20)
    stopped = run_folder(cut)
    assert not (stopped / "model").exists(), "it was over before it was killed"
    code, _, err = start("train", f"resume={stopped}", cwd=cut).finish()
    assert code == 0, err
    assert_same_model(stopped, whole)
    assert [row["step"] for row in read_metrics(stopped)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=3"], "has no recorded rollouts of step 3"),
        (["debug.rollouts=null"], "debug=train_only needs debug.rollouts="),
        (["debug=none"], "does nothing with debug=none"),
        (["debug=rollout_only", "debug.rollouts=null", "tracking.record_rollouts=false"], "records rollouts"),
        (["model=smollm2-135m"], "was recorded with another model"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(
    start: Start, tmp_path: Path, tiny_run: Path, overrides: list[str], message: str
) -> None:
    base = ["train", "experiment=tiny", "debug=train_only", f"debug.rollouts={tiny_run}"]
    code, _, err = start(*base, *overrides, cwd=tmp_path).finish(60)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert message in err


def test_a_damaged_recording_is_named(start: Start, tmp_path: Path, tiny_run: Path) -> None:
    shutil.copytree(tiny_run / "rollouts", tmp_path / "copy" / "rollouts")
    damaged = tmp_path / "copy" / "rollouts" / "step_000002.msgpack.gz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    base = ["train", "experiment=tiny", "debug=train_only", f"debug.rollouts={tmp_path / 'copy'}"]
    code, _, err = start(*base, cwd=tmp_path).finish(60)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "step_000002.msgpack.gz cannot be read as recorded rollouts" in err
