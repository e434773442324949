"""How far the trainer's log-probs are from those the inference engine recorded.

Measured before the first update of a batch, both are of the same weights, so the gap is numerical
(kernels, precision) or a stale weight. Either makes on-policy data silently off-policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Mismatch:
    """Token-wise |log-prob gap| and importance ratios, accumulated over micro-batches."""

    tokens: int = 0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    log_ratio_min: float = math.inf
    log_ratio_max: float = -math.inf
    #: Experts chosen at sampling for a token in a layer, and how often the trainer would have chosen others.
    choices: int = 0
    other_choices: int = 0

    def add(self, logprobs: Tensor, behaviour_logprobs: Tensor) -> None:
        """Take in a micro-batch.

        Args:
            logprobs: [T] float, the trainer's log-probs; gradients are ignored.
            behaviour_logprobs: [T] float, those recorded at sampling.
        """
        if logprobs.shape != behaviour_logprobs.shape:
            raise ValueError(f"{tuple(logprobs.shape)} log-probs against {tuple(behaviour_logprobs.shape)}")
        if logprobs.numel() == 0:
            return
        log_ratio = logprobs.detach().double() - behaviour_logprobs.double()
        self.tokens += log_ratio.numel()
        self.gap_sum += float(log_ratio.abs().sum())
        self.gap_max = max(self.gap_max, float(log_ratio.abs().max()))
        self.log_ratio_min = min(self.log_ratio_min, float(log_ratio.min()))
        self.log_ratio_max = max(self.log_ratio_max, float(log_ratio.max()))

    def add_choices(self, choices: int, other: int) -> None:
        """Take in what was replayed in a micro-batch, and what of it the trainer had chosen otherwise."""
        self.choices += choices
        self.other_choices += other

    def merge(self, other: Mismatch) -> None:
        """Take in what was measured elsewhere."""
        self.tokens += other.tokens
        self.gap_sum += other.gap_sum
        self.gap_max = max(self.gap_max, other.gap_max)
        self.log_ratio_min = min(self.log_ratio_min, other.log_ratio_min)
        self.log_ratio_max = max(self.log_ratio_max, other.log_ratio_max)
        self.add_choices(other.choices, other.other_choices)

    def metrics(self) -> dict[str, float]:
        """`logprob_gap_mean` and `logprob_gap_max` (nats), `ratio_min` and `ratio_max`.

        With replayed experts also `other_experts_share`, of the choices that the trainer had made otherwise.
        """
        if self.tokens == 0:
            return {"logprob_gap_mean": 0.0, "logprob_gap_max": 0.0, "ratio_min": 1.0, "ratio_max": 1.0}
        replayed = {"other_experts_share": self.other_choices / self.choices} if self.choices else {}
        return {
            **replayed,
            "logprob_gap_mean": self.gap_sum / self.tokens,
            "logprob_gap_max": self.gap_max,
            "ratio_min": _exp(self.log_ratio_min),
            "ratio_max": _exp(self.log_ratio_max),
        }


def _exp(x: float) -> float:
    """exp that overflows to infinity instead of raising: a metric must not end a run."""
    return math.exp(x) if x < 700 else math.inf
