"""However a run ends, its newest checkpoint is what the record says, and leads to the same end."""

from __future__ import annotations

import copy
import json
import os
from contextlib import nullcontext
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from k2rl.errors import ConfigError, RunError
from k2rl.lifecycle import Interrupted, resume_step
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.timeline import read_timeline
from k2rl.training.checkpoint import (
    ABOUT_FILE,
    About,
    checkpoint_folder,
    file_records,
    replaced_folder,
    write_about,
)
from tests.lifecycle.conftest import STATE_FILE, WARM_START_GAIN, Story, Trouble, die, fail, interrupt

STEPS = 2
WARM = 2 * WARM_START_GAIN

# Every call of a run of two steps with a warm start, in order.
BEFORE_RL = ["publish 1", "logprob_gap 1", "rollout 1", "reset_optimizer 1", "sft_step 1", "sft_step 2"]
BEFORE_RL += ["publish 2", "reset_optimizer 2"]
DURING_RL = [
    "save 1",
    "rollout 2",
    "saved 1",
    "rollout 3",
    "policy_step 1",
    "publish 3",
    "save 2",
    "rollout 4",
]
DURING_RL += ["policy_step 2", "publish 4", "saved 2", "save 3", "rollout 5", "saved 3", "save_pretrained 1"]


def test_the_calls_are_those(story: Story) -> None:
    assert story.play().calls == BEFORE_RL + DURING_RL
    assert story.saved == {STEPS: WARM + STEPS}


@pytest.mark.parametrize("event", [interrupt, fail])
@pytest.mark.parametrize("call", BEFORE_RL)
def test_a_run_stopped_before_rl_leaves_nothing_to_resume(story: Story, call: str, event: Trouble) -> None:
    """Least of all a checkpoint of step 0 whose resumption would pass over the warm start."""
    with pytest.raises((Interrupted, RunError)) as ending:
        story.play({call: event})
    assert not (story.run_dir / "checkpoints").exists()
    if event is interrupt:
        assert "nothing to resume" in str(ending.value)
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        story.play(resume=True)


@pytest.mark.parametrize("event", [interrupt, fail])
@pytest.mark.parametrize("call", DURING_RL)
def test_a_stopped_run_goes_on_to_the_same_end(story: Story, call: str, event: Trouble) -> None:
    survives = call.split()[0] in ("save", "saved") and event is fail  # another is written later; see below
    with nullcontext() if survives else pytest.raises(Interrupted if event is interrupt else RunError):
        story.play({call: event})
    assert json.loads((story.run_dir / "summary.json").read_text())["eval_base"]["n"] == 8
    assert (story.run_dir / "report.html").stat().st_size > 0
    ((step, weights),) = story.saved.items()
    assert weights == WARM + step, "the trainer was ahead of the record"
    if survives:
        return
    worker = story.play(resume=True)
    assert worker.weights == WARM + STEPS
    assert [row["step"] for row in read_metrics(story.run_dir)] == [1, 2]
    assert story.saved == {STEPS: WARM + STEPS}
    repeated = [phase for phase in read_timeline(story.run_dir) if phase.phase in ("load", "self-check")]
    assert {phase.step for phase in repeated} == {0}, "a resume's start is no part of the step before it"


def test_ctrl_c_in_a_step_waits_for_its_end(story: Story) -> None:
    with pytest.raises(Interrupted, match=f"after step 1; go on with: k2rl train resume={story.run_dir}"):
        story.play({"policy_step 1": interrupt}, checkpoint_every=0)
    assert story.saved == {1: WARM + 1}


@pytest.mark.parametrize("call", ["save 2", "rollout 4"])
def test_ctrl_c_while_a_checkpoint_is_written_waits_for_it(story: Story, call: str) -> None:
    with pytest.raises(Interrupted, match="after step 1"):
        story.play({call: interrupt})
    assert story.worker.calls[-1] == "saved 2"
    assert "save 3" not in story.worker.calls
    assert story.saved == {1: WARM + 1}


def test_an_error_in_a_step_waits_for_the_checkpoint_of_the_one_before(story: Story) -> None:
    with pytest.raises(RunError, match="something broke"):
        story.play({"policy_step 2": fail}, keep=2)
    assert story.worker.calls[-2:] == ["policy_step 2", "saved 2"]
    assert story.saved == {0: WARM, 1: WARM + 1}


@pytest.mark.parametrize("call", ["policy_step 2", "publish 4"])
def test_a_step_that_fails_after_ctrl_c_is_reported_and_not_saved(story: Story, call: str) -> None:
    trouble = {"policy_step 2": interrupt, "publish 4": fail}

    async def both(worker: object) -> None:
        await interrupt(worker)  # type: ignore[arg-type]
        await fail(worker)  # type: ignore[arg-type]

    if call == "policy_step 2":
        trouble = {call: both}
    with pytest.raises(RunError, match="something broke"):
        story.play(trouble, checkpoint_every=0)
    assert story.saved == {0: WARM}, "the trainer was ahead of the record"


def test_finished_steps_outlive_a_failure(story: Story) -> None:
    with pytest.raises(RunError, match="something broke"):
        story.play({"rollout 4": fail}, checkpoint_every=0)
    assert story.saved == {1: WARM + 1}
    assert json.loads((story.run_dir / "summary.json").read_text())["steps"] == 1
    assert "after step 1; go on with" in (story.run_dir / "notes.jsonl").read_text()


def test_a_dead_worker_is_asked_for_nothing_more(story: Story) -> None:
    with pytest.raises(RunError, match="worker 0 died"):
        story.play({"rollout 4": die}, checkpoint_every=0)
    assert story.worker.calls[-1] == "rollout 4"
    assert story.saved == {0: WARM}


def test_a_save_that_fails_hides_no_error(story: Story) -> None:
    async def full(worker: object) -> None:
        raise RunError("disk full")

    with pytest.raises(RunError, match="something broke"):
        story.play({"rollout 4": fail, "saved 2": full}, checkpoint_every=0)
    assert story.saved == {0: WARM}


def test_a_damaged_newest_checkpoint_is_passed_over(story: Story) -> None:
    with pytest.raises(Interrupted):
        story.play({"rollout 4": interrupt})
    damaged = checkpoint_folder(story.run_dir, 2)
    damaged.mkdir()
    (damaged / STATE_FILE).write_text("half")
    torn = damaged.with_name(f".step_000002.{os.getpid()}.new")
    torn.mkdir()
    assert story.play(resume=True).weights == WARM + STEPS
    assert story.worker.calls[0] == "load 1"
    assert story.saved == {STEPS: WARM + STEPS}
    assert [path.name for path in (story.run_dir / "checkpoints").iterdir()] == ["step_000002"]


def test_a_checkpoint_whose_bytes_have_changed_is_set_aside_for_the_one_before(story: Story) -> None:
    with pytest.raises(Interrupted):
        story.play({"rollout 5": interrupt}, keep=2)
    assert sorted(story.saved) == [1, 2]
    state = checkpoint_folder(story.run_dir, 2) / STATE_FILE
    state.write_text(str(int(state.read_text()) ^ 1))
    story.play(resume=True, keep=2)
    assert story.worker.calls[0] == "load 1"
    assert story.saved == {1: WARM + 1, STEPS: WARM + STEPS}
    assert (story.run_dir / "checkpoints" / "step_000002.damaged" / STATE_FILE).exists()
    assert (
        "step_000002 is damaged and was set aside; going on from step 1"
        in (story.run_dir / "notes.jsonl").read_text()
    )


def test_a_resume_without_a_sound_checkpoint_is_refused(story: Story) -> None:
    with pytest.raises(Interrupted):
        story.play({"rollout 4": interrupt})
    for folder in (story.run_dir / "checkpoints").iterdir():
        (folder / STATE_FILE).write_bytes(b"?" * (folder / STATE_FILE).stat().st_size)
    with pytest.raises(ConfigError, match="there is no whole checkpoint"):
        story.play(resume=True)


@pytest.mark.parametrize("call", ["save 2", "saved 2"])
def test_a_due_checkpoint_that_cannot_be_written_does_not_end_the_run(story: Story, call: str) -> None:
    async def full(worker: object) -> None:
        raise RunError("checkpoint step_000001 cannot be written: [Errno 28] No space left on device\nlog")

    # The first is that after the warm start, the second a due one.
    story.play({call: full}, keep=2)
    assert story.saved == {0: WARM, STEPS: WARM + STEPS}
    assert (
        "no checkpoint of step 1 was written, the last one is of step 0: checkpoint step_000001 cannot be"
        in (story.run_dir / "notes.jsonl").read_text()
    )


def test_a_resume_is_recorded_only_once_it_is_loaded(story: Story) -> None:
    with pytest.raises(Interrupted):
        story.play({"rollout 4": interrupt})
    assert story.recorded == 1
    with pytest.raises(RunError):
        story.play({"load 1": fail}, resume=True)
    assert story.recorded == 1
    story.play(resume=True)
    assert story.recorded == 2
    with pytest.raises(ConfigError, match="the run is over; set train.steps above 2"):
        story.play(resume=True)


def test_a_checkpoint_of_something_else_is_refused_before_anything_starts(story: Story) -> None:
    with pytest.raises(Interrupted):
        story.play({"rollout 4": interrupt})
    config = copy.deepcopy(story.prepared.config)
    config.resume = str(story.run_dir)
    assert resume_step(replace(story.prepared, config=config)) == 1

    save_file({"weight": np.zeros((4, 4), dtype=np.float32)}, story.run_dir / "model.safetensors")
    other = replace(story.prepared, config=config, model_path=story.run_dir)
    with pytest.raises(ConfigError, match=r"model\.path=tiny-qwen3 have other shapes than those of tiny"):
        resume_step(other)
    config.optimizer.name = "adamw"
    with pytest.raises(ConfigError, match=r"optimizer\.name=adamw cannot take up the state of muon"):
        resume_step(replace(story.prepared, config=config))
    about = checkpoint_folder(story.run_dir, 1) / "checkpoint.json"
    about.write_text(about.read_text().replace('"format": 3', '"format": 99'))
    with pytest.raises(ConfigError, match="step_000001 has format 99, not 3"):
        resume_step(replace(story.prepared, config=config))


@pytest.mark.parametrize("call", ["save", "saved"])
@pytest.mark.parametrize(("first", "left"), [(1, []), (3, [0, 1])])
def test_the_first_and_the_last_checkpoint_must_be_written(
    story: Story, call: str, first: int, left: list[int]
) -> None:
    """In the background, once more when the run relies on it, and once more when that has ended the run."""
    with pytest.raises(RunError, match="something broke"):
        story.play({f"{call} {number}": fail for number in range(first, first + 3)}, keep=2)
    assert sorted(story.saved) == left
    assert f"{call} {first + 3}" not in story.worker.calls


def test_finished_rollouts_are_not_played_again(story: Story) -> None:
    """They were recorded; the step that was to learn from them died."""
    with pytest.raises(RunError, match="something broke"):
        story.play({"policy_step 2": fail})
    worker = story.play(resume=True)
    assert worker.calls[0] == "load 1"
    assert [call.split()[0] for call in worker.calls].count("rollout") == 1, "the evaluation's alone"
    assert worker.weights == WARM + STEPS
    assert (
        "step 2: its rollouts were recorded with these weights" in (story.run_dir / "notes.jsonl").read_text()
    )


def test_rollouts_of_other_weights_are_played_again(story: Story) -> None:
    with pytest.raises(RunError, match="something broke"):
        story.play({"policy_step 2": fail})
    state = checkpoint_folder(story.run_dir, 1)
    with replaced_folder(state) as folder:
        (folder / STATE_FILE).write_text("7")
        about = msgspec.json.decode((state / ABOUT_FILE).read_bytes(), type=About)
        write_about(folder, msgspec.structs.replace(about, files=file_records([folder / STATE_FILE])))
    worker = story.play(resume=True)
    assert [call.split()[0] for call in worker.calls].count("rollout") == 2
