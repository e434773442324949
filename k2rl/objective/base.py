"""What a policy loss is: a pure function from flat sampled tokens to a scalar and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class PolicyLossInputs:
    """The sampled tokens of one micro-batch, flat: T tokens of S sequences.

    Prompt, tool and environment tokens are not here at all, so no loss can leak into them.
    """

    #: [T] float32, log-probs of the policy being trained, under the sampling temperature; has a gradient.
    logprobs: Tensor
    #: [T] float32, log-probs recorded when the tokens were sampled, under the same temperature.
    behaviour_logprobs: Tensor
    #: [T] int64 in [0, S), the sequence of each token.
    sequence_index: Tensor
    #: [S] float32, reward minus group mean.
    advantages: Tensor
    #: Sequences in the whole batch: the normaliser, so that micro-batch losses add up to the batch loss.
    num_sequences_total: int

    def __post_init__(self) -> None:
        tokens = self.logprobs.shape
        if self.behaviour_logprobs.shape != tokens or self.sequence_index.shape != tokens or len(tokens) != 1:
            raise ValueError(
                f"logprobs {tuple(tokens)}, behaviour_logprobs {tuple(self.behaviour_logprobs.shape)} and "
                f"sequence_index {tuple(self.sequence_index.shape)} must be of one length"
            )
        if self.advantages.ndim != 1:
            raise ValueError(f"advantages must be [S], not {tuple(self.advantages.shape)}")
        if self.num_sequences_total < self.advantages.shape[0]:
            raise ValueError(
                f"num_sequences_total={self.num_sequences_total} is less than the "
                f"{self.advantages.shape[0]} sequences at hand"
            )


@dataclass(frozen=True)
class PolicyLossOutput:
    """A micro-batch's share of the batch loss and of its metrics; both add up over micro-batches."""

    #: Scalar float32 with gradient.
    loss: Tensor
    #: Detached scalars, already divided by the whole batch's normaliser.
    metrics: dict[str, Tensor] = field(default_factory=dict)


PolicyLoss = Callable[[PolicyLossInputs], PolicyLossOutput]
