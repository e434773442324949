import json
from collections.abc import Callable
from pathlib import Path

import pytest

from k2rl.evaluation.results import EvaluationResult, save_result, summarise
from k2rl.tracking.summary import write_summary
from k2rl.types import Trajectory

MakeRun = Callable[..., Path]


def test_the_summary_of_a_whole_run(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=10, total=10, evaluations=("base", "before", "after"))
    write_summary(run)
    summary = json.loads((run / "summary.json").read_text())
    for name, key in [("base", "eval_base"), ("before", "eval_before"), ("after", "eval_after")]:
        saved = json.loads((run / "evaluations" / f"{name}.json").read_text())
        assert {k: summary[key][k] for k in ("reward", "n", "ci95")} == {
            k: saved[k] for k in ("reward", "n", "ci95")
        }
    assert summary["eval_before"]["per_kind"]["add"]["n"] == 40
    gain = summary["eval_after"]["reward"] - summary["eval_before"]["reward"]
    assert summary["rl_gain"]["reward"] == pytest.approx(gain)
    assert (summary["steps"], summary["model"], summary["env"], summary["seed"]) == (
        10,
        "smollm2-135m",
        "calculator",
        7,
    )


def test_failures_and_throughput_come_from_the_steps(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run", steps=10, total=10, evaluations=("before", "after"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = write_summary(run)
    assert summary.failed_episodes == 2 + 2 + 1  # of steps 3 and 10, and of the evaluation `after`
    assert summary.samples_per_second == pytest.approx(960 / sum(row["time/step_s"] for row in rows))
    assert summary.wall_seconds > rows[-1]["wall_seconds"]  # the last evaluation counts


def test_a_run_without_steps_or_evaluations_has_a_summary_without_nan(tmp_path: Path) -> None:
    summary = write_summary(tmp_path)
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text
    values = json.loads(text)
    required = ("eval_before", "eval_after", "steps", "wall_seconds", "samples_per_second", "failed_episodes")
    assert [values[key] for key in required] == [None, None, 0, 0.0, 0.0, 0]
    assert summary.rl_gain is None


def test_an_evaluation_that_scored_nothing_is_null_and_no_gain_is_claimed(
    tmp_path: Path, trajectory: Callable[..., Trajectory], evaluation: Callable[..., EvaluationResult]
) -> None:
    save_result(tmp_path, summarise("before", 0, [trajectory(reward=None)]))
    save_result(tmp_path, evaluation("after", 5, 0.5))
    values = json.loads((write_summary(tmp_path), (tmp_path / "summary.json").read_text())[1])
    assert values["eval_before"] == {"reward": None, "n": 0, "ci95": None, "failed": 1} | {
        "per_kind": {"add": {"reward": None, "n": 0, "ci95": None, "failed": 1}}
    }
    assert values["rl_gain"] is None
