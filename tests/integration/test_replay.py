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
from tests.integration.conftest import STEPS, Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("tiny_run")]

Start = Callable[..., Command]


def run_folder(cwd: Path) -> Path:
    (folder,) = (path.parent for path in cwd.glob("outputs/tiny/*/metrics.jsonl"))
    return folder


def assert_same_model(one: Path, other: Path) -> None:
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_training_on_a_run_s_rollouts_killed_and_resumed_makes_its_model_again(
    start: Start, tmp_path: Path, tiny_run: Path
) -> None:
    """To the bit, whatever was in the way."""
    again = ("train", "experiment=tiny", "seed=1", f"train.steps={STEPS}", "train.checkpoint_every=1")
    command = start(*again, "debug=train_only", f"debug.rollouts={tiny_run}", cwd=tmp_path)
    wait_for(lambda: any(checkpoints(run) for run in tmp_path.glob("outputs/tiny/*")), "a checkpoint")
    command.look()
    os.kill(command.process.pid, signal.SIGKILL)
    command.finish(90)
    stopped = run_folder(tmp_path)
    assert not (stopped / "model").exists(), "it was over before it was killed"
    code, _, err = start("train", f"resume={stopped}", cwd=tmp_path).finish()
    assert code == 0, err
    assert_same_model(stopped, tiny_run)
    ours, theirs = read_metrics(stopped), read_metrics(tiny_run)
    for name in ("step", "reward/mean", "train/loss", "train/grad_norm", "mismatch/mean_abs_gap"):
        assert [row[name] for row in ours] == [row[name] for row in theirs], name
    assert not any(name.startswith(("publish/", "rollout/tokens_per_second")) for name in ours[0])


@pytest.mark.slow
def test_rollouts_can_be_recorded_without_a_trainer(start: Start, tmp_path: Path) -> None:
    play = ("train", "experiment=tiny", "debug=rollout_only", f"train.steps={STEPS}")
    code, out, err = start(*play, cwd=tmp_path).finish()
    assert code == 0, err
    recorded = run_folder(tmp_path)
    assert recorded_steps(recorded) == list(range(1, STEPS + 1))
    assert f"rollouts: {recorded / 'rollouts'}" in out
    assert not (recorded / "model").exists()
    assert [row["rollout/episodes"] for row in read_metrics(recorded)] == [8] * STEPS
    train = ("train", "experiment=tiny", "debug=train_only", f"debug.rollouts={recorded}")
    (tmp_path / "trained").mkdir()
    code, _, err = start(*train, f"train.steps={STEPS}", cwd=tmp_path / "trained").finish()
    assert code == 0, err
    assert len(read_metrics(run_folder(tmp_path / "trained"))) == STEPS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"train.steps={STEPS + 1}"], f"has no recorded rollouts of step {STEPS + 1}"),
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
