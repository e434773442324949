"""The policy gradient itself; RLOO with the leave-one-out baseline (arXiv 2402.14740)."""

from __future__ import annotations

import torch

from k2rl.objective.base import PolicyLossInputs, PolicyLossOutput
from k2rl.objective.correction import Correction


def reinforce_loss(
    inputs: PolicyLossInputs, average_over: str, correction: Correction | None = None
) -> PolicyLossOutput:
    r"""`loss = -average_t A log pi_theta(y_t)`: on policy, so one update a batch.

    Args:
        inputs: the sampled tokens of a micro-batch.
        average_over: `sums` is the gradient of the expected reward; see `PolicyLossInputs.average`.
        correction: weights against the mismatch of trainer and inference engine.

    Returns:
        The loss and the correction's metrics.
    """
    weights, metrics = correction(inputs) if correction else (torch.ones_like(inputs.logprobs), {})
    values = -weights * inputs.token_advantages * inputs.logprobs
    return PolicyLossOutput(inputs.average(values, average_over), metrics)
