import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k2rl.config import TrackingConfig
from k2rl.errors import ConfigError
from k2rl.evaluation.results import EvaluationResult, load_results
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.timeline import read_timeline
from k2rl.tracking.tracker import Tracker
from k2rl.types import Trajectory

QUIET = TrackingConfig(live="off")


def test_a_step_gets_the_seconds_of_its_phases(tmp_path: Path) -> None:
    with Tracker(tmp_path, QUIET, total_steps=2) as tracker:
        with tracker.phase("start"):
            pass
        with tracker.phase("rollout", 1):
            tracker.progress(1, 2)
        with tracker.phase("train", 1):
            pass
        metrics = tracker.step(1, {"reward/mean": 0.5})
    assert {"reward/mean", "time/rollout_s", "time/train_s", "time/step_s"} == set(metrics)
    assert metrics["time/step_s"] >= metrics["time/rollout_s"] + metrics["time/train_s"]
    (row,) = read_metrics(tmp_path)
    assert metrics == {name: value for name, value in row.items() if name not in ("step", "wall_seconds")}
    assert [phase.phase for phase in read_timeline(tmp_path)] == ["start", "rollout", "train"]


def test_a_resumed_run_rewinds_everything_to_its_step(
    tmp_path: Path, make_run: Callable[..., Path], evaluation: Callable[..., EvaluationResult]
) -> None:
    run = make_run(tmp_path / "run", steps=12, total=12, evaluations=("before", "after"))
    (run / "summary.json").write_text("{}")
    with Tracker(run, QUIET, total_steps=20, resume_step=5) as tracker:
        with tracker.phase("rollout", 6):
            pass
        tracker.step(6, {"reward/mean": 0.9})
        tracker.note("resumed at step 5")
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["wall_seconds"] >= rows[-2]["wall_seconds"]
    assert max(phase.step for phase in read_timeline(run)) == 6
    assert list(load_results(run)) == ["before", "step_5"]
    assert not (run / "summary.json").exists()
    notes = [json.loads(line)["text"] for line in (run / "notes.jsonl").read_text().splitlines()]
    assert notes == ["2 of 96 episodes failed: sandbox died: out of memory", "resumed at step 5"]


def test_a_note_may_hold_any_text(tmp_path: Path) -> None:
    with Tracker(tmp_path, QUIET, total_steps=2) as tracker:
        tracker.note("tool said \x1b[31m and \udc80")
    assert json.loads((tmp_path / "notes.jsonl").read_text())["text"] == "tool said \\x1b[31m and \\xdc80"


def test_samples_and_evaluations_are_files(
    tmp_path: Path, trajectory: Callable[..., Trajectory], evaluation: Callable[..., EvaluationResult]
) -> None:
    with Tracker(tmp_path, QUIET, total_steps=2) as tracker:
        assert tracker.samples(2, [trajectory()]) == tmp_path / "samples" / "step_000002.txt"
        assert tracker.evaluation(evaluation("before", 0, 0.5)) == tmp_path / "evaluations" / "before.json"


def test_sinks_are_only_made_when_asked_for(tmp_path: Path) -> None:
    Tracker(tmp_path / "a", TrackingConfig(live="off", tensorboard=False), 1).close()
    Tracker(tmp_path / "b", TrackingConfig(live="off", tensorboard=True), 1).close()
    assert not (tmp_path / "a" / "tensorboard").exists()
    assert list((tmp_path / "b" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_missing_wandb_is_found_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs the wandb package"):
        Tracker(tmp_path, TrackingConfig(live="off", wandb=True), 1)


def test_close_may_be_called_twice_and_after_an_exception(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, QUIET, 1)
    with pytest.raises(RuntimeError, match="boom"), tracker, tracker.phase("train", 1):
        raise RuntimeError("boom")
    tracker.close()
    assert [phase.phase for phase in read_timeline(tmp_path)] == ["train"]


def test_without_a_terminal_a_step_is_one_plain_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    with Tracker(tmp_path, TrackingConfig(live="auto"), 3) as tracker:
        tracker.step(1, {"reward/mean": 0.5})
    assert out.getvalue().startswith("step 1/3  reward 0.500")
    assert out.getvalue().count("\n") == 1
