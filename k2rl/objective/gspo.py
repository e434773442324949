"""GSPO: the importance ratio of a whole sequence (arXiv 2507.18071)."""

from __future__ import annotations

import torch

from k2rl.objective.base import PolicyLossInputs, PolicyLossOutput


def gspo_loss(inputs: PolicyLossInputs, clip_low: float, clip_high: float) -> PolicyLossOutput:
    r"""Clipped surrogate on sequence level, equation 5 of the paper.

    With `s_i = exp(mean_t [log pi_theta(y_it) - log pi_proximal(y_it)])`, the geometric mean of the ratios of
    sequence i's tokens,

        loss = -1/N sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

    Args:
        inputs: the sampled tokens of a micro-batch.
        clip_low: in [0, 1]; the paper's is 3e-4, as a mean over tokens moves little.
        clip_high: at least 0; the paper's is 4e-4.

    Returns:
        The loss, and the metric `clipped` (share of sequences without a gradient).
    """
    ratio = inputs.sequence_mean(inputs.logprobs - inputs.proximal_logprobs).exp()
    free = ratio * inputs.advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * inputs.advantages
    total = inputs.num_sequences_total
    clipped = (bounded.detach() < free.detach()).sum() / total
    return PolicyLossOutput(-torch.minimum(free, bounded).sum() / total, {"clipped": clipped})
