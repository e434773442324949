"""PPO's clipped ratio without a critic: the objective of GRPO, Dr. GRPO and DAPO."""

from __future__ import annotations

import torch

from k2rl.objective.base import PolicyLossInputs, PolicyLossOutput
from k2rl.objective.correction import Correction


def clipped_loss(
    inputs: PolicyLossInputs,
    clip_low: float,
    clip_high: float,
    average_over: str,
    correction: Correction | None = None,
) -> PolicyLossOutput:
    r"""Clipped surrogate (PPO, arXiv 1707.06347, equation 7) with a group's advantages.

    With `rho_t = pi_theta(y_t) / pi_proximal(y_t)` and its sequence's advantage A,

        loss = -average_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)

    | objective | advantages | clip_low, clip_high | average over |
    | --- | --- | --- | --- |
    | GRPO (arXiv 2402.03300) | normalised | 0.2, 0.2 | sequences |
    | Dr. GRPO (arXiv 2503.20783) | mean | 0.2, 0.2 | sums (a constant factor aside) |
    | DAPO (arXiv 2503.14476) | normalised | 0.2, 0.28 | tokens |

    Args:
        inputs: the sampled tokens of a micro-batch.
        clip_low: in [0, 1].
        clip_high: at least 0.
        average_over: see `PolicyLossInputs.average`.
        correction: weights against the mismatch of trainer and inference engine.

    Returns:
        The loss, and the metrics `clipped` (share of tokens without a gradient), `policy_kl` (mean of
        `rho - 1 - log rho`, an estimate of KL(proximal || policy) in nats a token) and the correction's.
    """
    log_ratio = inputs.logprobs - inputs.proximal_logprobs
    ratio, advantages = log_ratio.exp(), inputs.token_advantages
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    weights, metrics = correction(inputs) if correction else (torch.ones_like(free), {})
    loss = inputs.average(-torch.minimum(free, bounded) * weights, average_over)
    return PolicyLossOutput(
        loss,
        {
            "clipped": inputs.share(bounded.detach() < free.detach()),
            "policy_kl": inputs.average((ratio - 1 - log_ratio).detach(), over="tokens"),
            **metrics,
        },
    )
