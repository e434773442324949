"""CISPO: importance weights are clipped, gradients of tokens are not (MiniMax-M1, arXiv 2506.13585)."""

from __future__ import annotations

import torch

from k2rl.objective.base import PolicyLossInputs, PolicyLossOutput
from k2rl.objective.correction import Correction


def cispo_loss(
    inputs: PolicyLossInputs,
    clip_low: float,
    clip_high: float,
    average_over: str,
    correction: Correction | None = None,
) -> PolicyLossOutput:
    r"""REINFORCE with clipped importance weights, equations 4 and 5 of the paper.

    With `rho_t = pi_theta(y_t) / pi_proximal(y_t)`, its sequence's advantage A, and no gradient through clip,

        loss = -average_t clip(rho_t, 1 - clip_low, 1 + clip_high) A log pi_theta(y_t)

    Args:
        inputs: the sampled tokens of a micro-batch.
        clip_low: in [0, 1]; 1 is no lower bound, as in the paper.
        clip_high: at least 0.
        average_over: see `PolicyLossInputs.average`; the paper's is `tokens`.
        correction: weights against the mismatch of trainer and inference engine.

    Returns:
        The loss, and the metrics `clipped` (share of tokens whose weight was) and the correction's.
    """
    ratio = (inputs.logprobs - inputs.proximal_logprobs).detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    corrected, metrics = correction(inputs) if correction else (torch.ones_like(weight), {})
    values = -weight * corrected * inputs.token_advantages * inputs.logprobs
    return PolicyLossOutput(
        inputs.average(values, average_over), {"clipped": inputs.share(weight != ratio), **metrics}
    )
