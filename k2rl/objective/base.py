"""What a policy loss is: a pure function from flat sampled tokens to a scalar and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLossInputs:
    """The sampled tokens of one micro-batch, flat: T tokens of S whole sequences.

    Prompt, tool and environment tokens are not here at all, so no loss can leak into them.
    """

    #: [T] float32, log-probs of the policy being trained, under the sampling temperature; has a gradient.
    logprobs: Tensor
    #: [T] float32, log-probs recorded when the tokens were sampled, under the same temperature.
    behaviour_logprobs: Tensor
    #: [T] float32, log-probs by the trainer before the first update on this batch: of the same weights as the
    #: behaviour log-probs, if those are not stale, but by the kernels that compute `logprobs`.
    proximal_logprobs: Tensor
    #: [T] int64 in [0, S), the sequence of each token.
    sequence_index: Tensor
    #: [S] float32, see `advantages.py`.
    advantages: Tensor
    #: Sequences and sampled tokens in the whole batch: the normalisers, so that micro-batch losses add up to
    #: the batch loss.
    num_sequences_total: int
    num_tokens_total: int
    #: [T] float32, log-probs of the reference policy, where a KL from it is part of the loss.
    reference_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        tokens = self.logprobs.shape
        per_token = [self.behaviour_logprobs, self.proximal_logprobs, self.sequence_index]
        if self.reference_logprobs is not None:
            per_token.append(self.reference_logprobs)
        if len(tokens) != 1 or any(values.shape != tokens for values in per_token):
            raise ValueError(
                f"logprobs {tuple(tokens)}, behaviour_logprobs {tuple(self.behaviour_logprobs.shape)}, "
                f"proximal_logprobs {tuple(self.proximal_logprobs.shape)} and "
                f"sequence_index {tuple(self.sequence_index.shape)} must be of one length"
            )
        if self.advantages.ndim != 1:
            raise ValueError(f"advantages must be [S], not {tuple(self.advantages.shape)}")
        for name, total, here in (
            ("num_sequences_total", self.num_sequences_total, self.advantages.shape[0]),
            ("num_tokens_total", self.num_tokens_total, tokens[0]),
        ):
            if total < max(here, 1):
                raise ValueError(f"{name}={total} is less than the {here} at hand, or than 1")

    @property
    def token_advantages(self) -> Tensor:
        """[T]: each token has its sequence's."""
        return self.advantages[self.sequence_index]

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[S]: of the [T] values of each sequence's tokens."""
        return torch.zeros_like(self.advantages).index_add(0, self.sequence_index, values)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[S]: of the [T] values of each sequence's tokens; 0 of a sequence without any."""
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values)).clamp(min=1)

    def average(self, values: Tensor, over: str) -> Tensor:
        """This micro-batch's share of an average of [T] values over the whole batch.

        Args:
            values: one a token.
            over: `tokens`: all tokens count alike; `sequences`: all sequences do, by the mean of their
                tokens; `sums`: all sequences do, by the sum of their tokens.
        """
        if over == "tokens":
            return values.sum() / self.num_tokens_total
        by_sequence = self.sequence_mean(values) if over == "sequences" else self.sequence_sum(values)
        return by_sequence.sum() / self.num_sequences_total

    def share(self, tokens: Tensor) -> Tensor:
        """This micro-batch's share of the share of all tokens for which a [T] bool holds."""
        return tokens.sum() / self.num_tokens_total


@dataclass(frozen=True)
class PolicyLossOutput:
    """A micro-batch's share of the batch loss and of its metrics; both add up over micro-batches."""

    #: Scalar float32 with gradient.
    loss: Tensor
    #: Detached scalars, already divided by the whole batch's normaliser.
    metrics: dict[str, Tensor] = field(default_factory=dict)


PolicyLoss = Callable[[PolicyLossInputs], PolicyLossOutput]
