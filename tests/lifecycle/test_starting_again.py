"""A worker dies in any call of a run: all are started anew, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import traceback

import pytest

from k2rl.errors import ConfigError, RunError
from k2rl.lifecycle import Interrupted
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.restarts import read_restarts
from k2rl.workers.handle import WorkerLostError
from tests.lifecycle.conftest import FINISHED_AT_DEATH, Story, die, fail, interrupt, vanish
from tests.lifecycle.test_endings import BEFORE_RL, DURING_RL, STEPS, WARM


@pytest.mark.parametrize("call", BEFORE_RL + DURING_RL)
def test_a_death_in_any_call_changes_nothing_of_the_end(story: Story, call: str) -> None:
    worker = story.play({call: die}, restarts=1)
    assert worker.weights == WARM + STEPS
    assert [row["step"] for row in read_metrics(story.run_dir)] == [1, 2]
    assert story.saved == {STEPS: WARM + STEPS}
    assert len(story.workers) == 2
    first = worker.calls[0]
    saved = DURING_RL.index("saved 1") + 1
    assert first == ("publish 1" if call in [*BEFORE_RL, *DURING_RL[:saved]] else first)
    assert first.startswith("load") == (call in DURING_RL[saved:])
    (restart,) = read_restarts(story.run_dir)
    assert restart.why == "worker 0 died"
    assert restart.step == sum(done in ("publish 3", "publish 4") for done in story.workers[0].calls[:-1])
    assert json.loads((story.run_dir / "summary.json").read_text())["restarts"] == 1
    notes = (story.run_dir / "notes.jsonl").read_text()
    assert "worker 0 died; restart 1 of recovery.max_restarts=1; going on from" in notes
    assert story.recorded == 1


def test_deaths_are_counted_over_all_starts(story: Story) -> None:
    with pytest.raises(WorkerLostError, match="worker 0 died"):
        story.play({"rollout 2": die, "policy_step 1": die, "policy_step 2": die}, restarts=2)
    assert len(story.workers) == 3
    assert len(read_restarts(story.run_dir)) == 2
    assert json.loads((story.run_dir / "summary.json").read_text())["steps"] == 1
    # Whoever resumes it has them all again, and the record goes on.
    assert story.play({"publish 1": die}, resume=True, restarts=1).weights == WARM + STEPS
    assert len(read_restarts(story.run_dir)) == 3


def test_other_errors_are_no_reason_to_start_again(story: Story) -> None:
    with pytest.raises(RunError, match="something broke"):
        story.play({"rollout 3": fail}, restarts=5)
    assert len(story.workers) == 1


def test_ctrl_c_after_a_restart_saves_as_ever(story: Story) -> None:
    with pytest.raises(Interrupted, match="after step 2"):
        story.play({"policy_step 1": die, "policy_step 2": interrupt}, restarts=5, checkpoint_every=0)
    assert story.saved == {2: WARM + 2}


def test_episodes_that_had_ended_before_a_death_are_not_played_again(story: Story) -> None:
    worker = story.play({"rollout 4": die}, restarts=1)
    assert worker.weights == WARM + STEPS
    episodes = story.workers[0].played[-1]
    # After an evaluation: the checkpoint of step 1 was still being written.
    assert worker.played[1] == episodes - FINISHED_AT_DEATH
    assert f"step 2: {FINISHED_AT_DEATH} of its rollouts" in (story.run_dir / "notes.jsonl").read_text()
    assert [row["rollout/episodes"] for row in read_metrics(story.run_dir)] == [episodes] * STEPS
    assert [path.suffix for path in sorted((story.run_dir / "rollouts").glob("step_*"))] == [".gz", ".gz"]


def test_rollouts_of_lost_steps_are_not_played_again(story: Story) -> None:
    worker = story.play({"policy_step 2": die}, restarts=1, checkpoint_every=0)
    assert worker.calls[0] == "load 1", "that of the warm start"
    assert [call.split()[0] for call in worker.calls].count("rollout") == 2, "evaluations alone"
    notes = (story.run_dir / "notes.jsonl").read_text()
    for step in (1, 2):
        assert f"step {step}: its rollouts were recorded with these weights" in notes


#: A call of each kind, and before RL one.
KILLED_IN = [
    "sft_step 2",
    "rollout 2",
    "saved 1",
    "rollout 3",
    "policy_step 2",
    "publish 4",
    "save 2",
    "saved 2",
]
KILLED_IN += ["rollout 5", "save_pretrained 1"]


@pytest.mark.parametrize("call", KILLED_IN)
def test_a_driver_that_is_killed_in_any_call_is_resumed_to_the_same_end(story: Story, call: str) -> None:
    """kill -9: nothing is tidied up or saved on the way out."""
    child = os.fork()
    if not child:
        try:
            story.play({call: vanish}, keep=2)
        except BaseException:  # noqa: BLE001 - this process must not go on with what its parent does
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    if call in [*BEFORE_RL, *DURING_RL[: DURING_RL.index("saved 1") + 1]]:
        assert not story.saved
        with pytest.raises(ConfigError, match="there is no whole checkpoint"):
            story.play(resume=True)
        return
    assert all(weights == WARM + step for step, weights in story.saved.items())
    assert story.play(resume=True, keep=2).weights == WARM + STEPS
    assert [row["step"] for row in read_metrics(story.run_dir)] == [1, 2]
    assert story.saved == {1: WARM + 1, STEPS: WARM + STEPS}
