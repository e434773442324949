"""What the trainer is fed: sequences of token ids with what is to be learned from them. No torch.

A policy batch is `list[list[TrainSequence]]`: groups of responses to one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from k2rl.types import Segment, Trajectory


class LabelledSequence(Protocol):
    """Tokens, and which of them the model is asked to predict."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def label_mask(self) -> tuple[bool, ...]: ...

    @property
    def routes(self) -> tuple[bytes, ...]: ...


class BatchTotals(NamedTuple):
    """What a policy loss is averaged over: a step's scored responses, also those left out of the batch."""

    sequences: int
    #: Sampled ones.
    tokens: int


@dataclass(frozen=True)
class TrainSequence:
    """One response with its prompt, ready for a policy update.

    Raises:
        ValueError: if lengths do not agree, the first token is marked as sampled, or a number is not finite.
    """

    token_ids: tuple[int, ...]
    #: True where the policy wrote a token that is to be learned from; same length as `token_ids`.
    sampled_mask: tuple[bool, ...]
    #: Log-probs recorded at sampling, of the sampled tokens alone, in order.
    behaviour_logprobs: tuple[float, ...]
    #: Reward minus group mean.
    advantage: float
    #: Names the sequence in error messages.
    id: str = ""
    #: Which experts computed each of its first positions at sampling, see `Generation.routes`; the others
    #: go where the trainer's routers send them.
    routes: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        _check_mask(self.id, self.token_ids, self.sampled_mask)
        sampled = sum(self.sampled_mask)
        if len(self.behaviour_logprobs) != sampled:
            raise ValueError(
                f"sequence {self.id!r}: {sampled} sampled tokens but {len(self.behaviour_logprobs)} log-probs"
            )
        if not math.isfinite(self.advantage) or not all(map(math.isfinite, self.behaviour_logprobs)):
            raise ValueError(f"sequence {self.id!r}: advantage or behaviour log-probs are not finite")

    @property
    def label_mask(self) -> tuple[bool, ...]:
        return self.sampled_mask

    @classmethod
    def from_trajectory(
        cls, trajectory: Trajectory, advantage: float, only: int | None = None
    ) -> TrainSequence:
        """The sequence of an episode; its first segment is the prompt.

        Args:
            trajectory: of the episode.
            advantage: of all its tokens.
            only: the version of the weights whose tokens are learned from; None: all.

        Raises:
            ValueError: if the trajectory is empty or begins with sampled tokens.
        """
        if not trajectory.segments:
            raise ValueError(f"trajectory {trajectory.id} has no tokens")
        return cls(
            token_ids=tuple(trajectory.token_ids),
            sampled_mask=tuple(
                _learned(segment, only) for segment in trajectory.segments for _ in segment.token_ids
            ),
            behaviour_logprobs=tuple(
                logprob
                for segment in trajectory.segments
                if _learned(segment, only)
                for logprob in segment.logprobs
            ),
            advantage=float(advantage),
            id=trajectory.id,
            routes=tuple(trajectory.routes),
        )


def num_sampled(trajectory: Trajectory, only: int | None = None) -> int:
    """The tokens of an episode that are learned from: see `TrainSequence.from_trajectory`."""
    return sum(len(segment.token_ids) for segment in trajectory.segments if _learned(segment, only))


def _learned(segment: Segment, only: int | None) -> bool:
    return segment.sampled and only in (None, segment.weight_version)


@dataclass(frozen=True)
class SupervisedSequence:
    """A text to imitate where `loss_mask` is True (a demonstration or PTX chat).

    Raises:
        ValueError: if lengths do not agree or the first token, which nothing predicts, has a loss.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    #: Names the sequence in error messages.
    id: str = ""
    #: See `TrainSequence`.
    routes: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        _check_mask(self.id, self.token_ids, self.loss_mask)

    @property
    def label_mask(self) -> tuple[bool, ...]:
        return self.loss_mask


def _check_mask(name: str, token_ids: tuple[int, ...], mask: tuple[bool, ...]) -> None:
    if not token_ids:
        raise ValueError(f"sequence {name!r} is empty")
    if len(mask) != len(token_ids):
        raise ValueError(f"sequence {name!r}: {len(token_ids)} tokens but a mask of {len(mask)}")
    if mask[0]:
        raise ValueError(f"sequence {name!r}: nothing predicts the first token, it cannot be a label")
