"""The PTX loss: next-token prediction on hand-picked data, beside the policy loss.

Kimi K2 (arXiv 2507.20534, section 3.2.3) adds it against forgetting; the same function is the
supervised loss of a warm start.
"""

from __future__ import annotations

from torch import Tensor


def ptx_loss(logprobs: Tensor, num_tokens_total: int) -> Tensor:
    """Mean negative log-likelihood over the batch's own tokens.

    Args:
        logprobs: [T] float32 with gradient, log-probs (temperature 1) of a micro-batch's loss tokens.
        num_tokens_total: loss tokens in the whole batch, so that micro-batch losses add up.

    Returns:
        Scalar float32: the micro-batch's share of the mean.

    Raises:
        ValueError: if `num_tokens_total` is less than T or not positive.
    """
    if num_tokens_total < max(1, logprobs.shape[0]):
        raise ValueError(f"num_tokens_total={num_tokens_total} for {logprobs.shape[0]} tokens at hand")
    return -logprobs.sum() / num_tokens_total
