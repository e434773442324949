"""Recorded rollouts: played without a trainer, trained on without vLLM, with the same bits every time."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from k2rl.composition import compose
from k2rl.errors import ConfigError
from k2rl.launch import check_recordings
from k2rl.preflight import preflight
from k2rl.rollouts.recording import recorded_steps
from k2rl.tracking.metrics import read_metrics
from k2rl.training.checkpoint import checkpoints
from tests.integration.conftest import Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("tiny_run")]

Start = Callable[..., Command]
STEPS = 6


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


def _newest_checkpoint(cwd: Path) -> int:
    return max((step for run in cwd.glob("outputs/tiny/*") for step, _ in checkpoints(run)), default=0)


def assert_same_model(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_training_on_a_run_s_rollouts_makes_its_model_again(
    start: Start, tmp_path: Path, tiny_run: Path
) -> None:
    again = trained(start, tmp_path / "again", tiny_run, "seed=1")
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
    wait_for(lambda: _newest_checkpoint(cut) > 0, "a checkpoint")
    command.look()
    os.kill(command.process.pid, signal.SIGKILL)
    command.finish(90)
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
        (["debug=rollout_only", "debug.rollouts=null", "resume=run"], "there is nothing to resume"),
        (["model=smollm2-135m"], "was recorded with another model"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(tiny_run: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(f"debug.rollouts={tiny_run}", *overrides)


def test_a_damaged_recording_is_named(tmp_path: Path, tiny_run: Path) -> None:
    shutil.copytree(tiny_run / "rollouts", tmp_path / "rollouts")
    damaged = tmp_path / "rollouts" / "step_000002.msgpack.gz"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"step_000002\.msgpack\.gz cannot be read as recorded rollouts"):
        check(f"debug.rollouts={tmp_path}")


def check(*overrides: str) -> None:
    """What is checked before anything starts."""
    config = compose(["experiment=tiny", "debug=train_only", *overrides])
    with closing(preflight(config)) as prepared:
        check_recordings(prepared)
