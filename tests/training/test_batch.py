"""Training sequences and where they come from."""

from __future__ import annotations

import math

import pytest

from k2rl.training.batch import SupervisedSequence, TrainSequence
from k2rl.types import Segment, Task, Trajectory


def trajectory(segments: list[Segment]) -> Trajectory:
    task = Task(id="t", env="e", kind="k", split="train", seed=0)
    return Trajectory(id="episode-1", group_id="g", task=task, temperature=1.0, segments=segments)


def test_from_trajectory_keeps_tokens_masks_and_log_probs() -> None:
    sequence = TrainSequence.from_trajectory(
        trajectory(
            [
                Segment((1, 2, 3), sampled=False),
                Segment((4, 5), sampled=True, logprobs=(-0.1, -0.2), weight_version=3),
                Segment((6,), sampled=False),
                Segment((7,), sampled=True, logprobs=(-0.3,), weight_version=3),
            ]
        ),
        advantage=0.5,
    )
    assert sequence == TrainSequence(
        token_ids=(1, 2, 3, 4, 5, 6, 7),
        sampled_mask=(False, False, False, True, True, False, True),
        behaviour_logprobs=(-0.1, -0.2, -0.3),
        advantage=0.5,
        id="episode-1",
    )
    assert sequence.label_mask == sequence.sampled_mask


def test_trajectories_that_cannot_be_trained_on_are_refused() -> None:
    with pytest.raises(ValueError, match="episode-1 has no tokens"):
        TrainSequence.from_trajectory(trajectory([]), 0.0)
    with pytest.raises(ValueError, match="first token"):
        TrainSequence.from_trajectory(trajectory([Segment((1,), sampled=True, logprobs=(-1.0,))]), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampled_mask": (False, True)}, "mask of 2"),
        ({"sampled_mask": (True, True, True)}, "first token"),
        ({"behaviour_logprobs": (-1.0,)}, "2 sampled tokens but 1 log-probs"),
        ({"advantage": math.inf}, "not finite"),
        ({"behaviour_logprobs": (-1.0, math.nan)}, "not finite"),
    ],
)
def test_inconsistent_sequences_are_refused(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "token_ids": (1, 2, 3),
        "sampled_mask": (False, True, True),
        "behaviour_logprobs": (-1.0, -2.0),
        "advantage": 0.0,
        "id": "x",
    }
    TrainSequence(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        TrainSequence(**{**good, **change})  # type: ignore[arg-type]


def test_supervised_sequences_are_checked_too() -> None:
    assert SupervisedSequence((1, 2), (False, True)).label_mask == (False, True)
    with pytest.raises(ValueError, match="'s' is empty"):
        SupervisedSequence((), (), id="s")
    with pytest.raises(ValueError, match="first token"):
        SupervisedSequence((1,), (True,))
