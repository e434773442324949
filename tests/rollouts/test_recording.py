"""Recordings of a step: what is read is what was written, and settings that decide are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2rl.config import Config
from k2rl.errors import ConfigError
from k2rl.rollouts.recording import (
    Source,
    read_recording,
    recorded_steps,
    settings_of,
    write_recording,
)
from k2rl.types import Message, Segment, Task, Trajectory, Verdict

SOURCE = Source("model", "settings", "weights", 7)
TRAJECTORIES = [
    Trajectory(
        f"step1-0-task-{k}",
        "group",
        Task("task", "calculator", "add", "train", 7, {"numbers": [1, 2]}),
        0.8,
        [Segment((1, 2), False), Segment((3, 4), True, (-0.1, -1e-17 - 1 / 3), 5)],
        [Message("user", "1 + 2 ≠ 4?"), Message("assistant", "3\x00")],
        "env_done",
        verdict=Verdict.scored(1.0, {"correct": 1.0}) if k else Verdict.failed("broken"),
    )
    for k in range(2)
]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    assert recorded_steps(tmp_path) == []
    path = write_recording(tmp_path, 3, SOURCE, TRAJECTORIES)
    again = write_recording(tmp_path, 12, SOURCE, TRAJECTORIES)
    assert recorded_steps(tmp_path) == [3, 12]
    assert path.read_bytes() == again.read_bytes(), "nothing of the time or place is in it"
    recording = read_recording(tmp_path, 3)
    assert recording.trajectories == TRAJECTORIES
    assert Source(recording.model, recording.settings, recording.weights, recording.version) == SOURCE


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_damaged_recordings_are_refused(tmp_path: Path, keep: int) -> None:
    path = write_recording(tmp_path, 1, SOURCE, TRAJECTORIES)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="cannot be read as recorded rollouts"):
        read_recording(tmp_path, 1)
    with pytest.raises(ConfigError, match="no recorded rollouts of step 2"):
        read_recording(tmp_path, 2)


def test_settings_that_decide_what_is_sampled_are_told_apart() -> None:
    known = settings_of(Config())
    assert settings_of(Config()) == known
    for change in ("seed", "rollout.group_size", "env.max_turns", "budget.default", "train.steps"):
        config = Config()
        *path, name = change.split(".")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, getattr(owner, name) + 1)
        assert settings_of(config) != known, change
    same = Config()
    same.optimizer.lr *= 2  # that is in the weights
    assert settings_of(same) == known
