import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2rl.config import TrackingConfig
from k2rl.errors import ConfigError
from k2rl.evaluation.results import EvaluationResult
from k2rl.tracking.sinks import TensorBoardSink, WandbSink
from k2rl.tracking.tracker import Tracker


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard itself reads from the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory)).Reload()
    return [(event.step, round(event.value, 6)) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(1, {"reward/mean": 0.25, "train/loss": 3.0})
    sink.write(2, {"reward/mean": 0.5})
    assert scalars(tmp_path, "reward/mean") == [(1, 0.25), (2, 0.5)]  # before it is closed
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(1, 3.0)]


def test_tensorboard_forgets_the_steps_a_resumed_run_repeats(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    for step in range(1, 5):
        first.write(step, {"reward/mean": 0.1})
    first.close()
    second = TensorBoardSink(tmp_path, resume_step=2)
    second.write(3, {"reward/mean": 0.9})
    second.close()
    assert scalars(tmp_path, "reward/mean") == [(1, 0.1), (2, 0.1), (3, 0.9)]


def test_evaluations_of_step_0_do_not_hide_each_other(
    tmp_path: Path, evaluation: Callable[..., EvaluationResult]
) -> None:
    results = [evaluation("base", 0, 0.1), evaluation("before", 0, 0.3), evaluation("after", 9, 0.6)]
    with Tracker(tmp_path, TrackingConfig(live="off"), 9) as tracker:
        for result in results:
            tracker.evaluation(result)
    base, before, after = (round(result.reward or 0, 6) for result in results)
    assert scalars(tmp_path / "tensorboard", "eval/base/reward") == [(0, base)]
    assert scalars(tmp_path / "tensorboard", "eval/reward") == [(0, before), (9, after)]


def test_wandb_that_is_not_installed_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        WandbSink(tmp_path, "k2rl", {})


def test_wandb_gets_the_metrics_and_a_resumed_run_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    starts: list[dict[str, Any]] = []

    def init(**options: Any) -> SimpleNamespace:
        starts.append(options)
        return SimpleNamespace(log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (1, 2):
        sink = WandbSink(tmp_path, "project", {"seed": 1})
        sink.write(step, {"reward/mean": 0.5, "train/loss": math.nan})
        sink.close()
    assert logged == [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 0.5}]
    assert starts[0]["id"] == starts[1]["id"]
    assert (starts[0]["project"], starts[0]["config"], starts[0]["resume"]) == (
        "project",
        {"seed": 1},
        "allow",
    )
