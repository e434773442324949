"""Importance weights against the mismatch of trainer and inference engine.

Both compute with the same weights, but not with the same kernels: what was sampled from is not quite the
policy that the trainer differentiates, and stale segments are further from it. Truncated importance sampling
(Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") bounds the weight
of a token; masked importance sampling leaves out the tokens that are too far off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from k2rl.objective.base import PolicyLossInputs

#: To [T] weights without a gradient, and metrics.
Correction = Callable[[PolicyLossInputs], tuple[Tensor, dict[str, Tensor]]]


def truncated(inputs: PolicyLossInputs, cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`min(pi_proximal / pi_behaviour, cap)` of each token; metrics as `masked`."""
    ratio = _ratio(inputs)
    return ratio.clamp(max=cap), _metrics(inputs, ratio, ratio > cap)


def masked(inputs: PolicyLossInputs, cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    """`pi_proximal / pi_behaviour` of each token, 0 where it is outside [1 / cap, cap].

    Args:
        inputs: the sampled tokens of a micro-batch.
        cap: above 1.

    Returns:
        The weights, and the metrics `correction_mean` (of the ratio, before it is cut) and `correction_cut`
        (share of tokens that it was cut for).
    """
    ratio = _ratio(inputs)
    outside = (ratio > cap) | (ratio < 1 / cap)
    return torch.where(outside, 0.0, ratio), _metrics(inputs, ratio, outside)


def _ratio(inputs: PolicyLossInputs) -> Tensor:
    return (inputs.proximal_logprobs - inputs.behaviour_logprobs).detach().exp()


def _metrics(inputs: PolicyLossInputs, ratio: Tensor, cut: Tensor) -> dict[str, Tensor]:
    return {
        "correction_mean": inputs.average(ratio, over="tokens"),
        "correction_cut": inputs.share(cut),
    }
