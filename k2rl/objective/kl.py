"""KL from the policy to a reference policy, as a term of the loss, estimated on the sampled tokens.

The estimators are those of Schulman's note on approximating KL, each with the gradient that it has as a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2rl.objective.base import PolicyLoss, PolicyLossInputs, PolicyLossOutput
from k2rl.objective.parameters import ESTIMATORS


def kl_to_reference(inputs: PolicyLossInputs, estimator: str) -> Tensor:
    r"""This micro-batch's share of an estimate of KL(policy || reference), in nats a token.

    With `d_t = log pi_theta(y_t) - log pi_ref(y_t)` and T tokens in the batch,

        k1 = 1/T sum_t d_t                       k2 = 1/T sum_t d_t^2 / 2
        k3 = 1/T sum_t (exp(-d_t) - 1 + d_t)     (GRPO's, arXiv 2402.03300)

    k1's plain gradient is that of the mean of log pi_theta: 0 on average, whatever the reference. Here
    k1 has the value above, and the gradient of the KL of whole responses, which is unbiased on policy:
    `1/T sum_i (sum_t d_it) * grad sum_t log pi_theta(y_it)`. The gradients of k2 and k3 look at each token
    by itself; k2's is `d_t * grad log pi_theta(y_t)`, k3's `(1 - exp(-d_t)) * grad log pi_theta(y_t)`.

    Args:
        inputs: the sampled tokens of a micro-batch, with the reference's log-probs.
        estimator: `k1`, `k2` or `k3`.

    Raises:
        ValueError: if there are no log-probs of a reference, or no such estimator.
    """
    if inputs.reference_logprobs is None:
        raise ValueError("there are no reference_logprobs to measure a KL from")
    drift = inputs.logprobs - inputs.reference_logprobs
    if estimator == "k1":
        of_sequence = inputs.sequence_sum(drift)
        credit = of_sequence.detach() * (of_sequence - of_sequence.detach())
        total = (of_sequence.detach() + credit).sum()
    elif estimator == "k2":
        total = 0.5 * drift.square().sum()
    elif estimator == "k3":
        total = (torch.expm1(-drift) + drift).sum()
    else:
        raise ValueError(f"estimator={estimator!r} is not one of: {', '.join(ESTIMATORS)}")
    return total / inputs.num_tokens_total


def with_kl(loss: PolicyLoss, weight: float, estimator: str) -> PolicyLoss:
    """`loss` plus `weight` times that KL, which becomes the metric `reference_kl`."""

    def penalised(inputs: PolicyLossInputs) -> PolicyLossOutput:
        output, kl = loss(inputs), kl_to_reference(inputs, estimator)
        return PolicyLossOutput(output.loss + weight * kl, {**output.metrics, "reference_kl": kl.detach()})

    return penalised
