import json
import math
from pathlib import Path

import pytest

from k2rl.errors import ConfigError, RunError
from k2rl.tracking.metrics import MetricsLog, read_metrics, series


def write_steps(directory: Path, steps: range, resume_step: int | None = None) -> None:
    log = MetricsLog(directory, resume_step)
    for step in steps:
        log.write(step, {"reward/mean": step / 10}, wall_seconds=step * 2.0)
    log.close()


def test_each_step_is_one_line_with_its_step_and_time(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "wall_seconds": 2.0, "reward/mean": 0.1},
        {"step": 2, "wall_seconds": 4.0, "reward/mean": 0.2},
    ]


def test_a_line_is_on_the_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"train/loss": 0.5}, 1.0)
    assert read_metrics(tmp_path) == [{"step": 1, "wall_seconds": 1.0, "train/loss": 0.5}]
    log.close()


def test_a_torn_last_line_is_left_out_and_cut_off_on_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    write_steps(tmp_path, range(3, 5), resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_file_torn_anywhere_in_its_last_line_can_be_resumed(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    write_steps(tmp_path, range(2, 3), resume_step=1)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_resuming_drops_the_steps_after_the_resumed_one(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 7), resume_step=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step":2', '"step":'))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2))
    with pytest.raises(ConfigError, match="holds an earlier run"):
        MetricsLog(tmp_path)


def test_what_is_not_a_finite_number_is_null_and_left_out_by_the_reader(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"reward/mean": math.nan, "train/loss": math.inf, "train/lr": 1.0}, 1.0)
    log.close()
    assert '"reward/mean":null' in (tmp_path / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path) == [{"step": 1, "wall_seconds": 1.0, "train/lr": 1.0}]


def test_a_run_without_metrics_has_no_steps(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_series_leaves_out_the_steps_without_the_metric() -> None:
    rows = [{"step": 1, "a": 0.5}, {"step": 2}, {"step": 3, "a": 0.7}]
    assert series(rows, "a") == [(1, 0.5), (3, 0.7)]
