"""The policy objective of Kimi k1.5 and K2: a squared error between reward and log-ratio.

Kimi k1.5 (arXiv 2501.12599, section 2.3.2) and Kimi K2 (arXiv 2507.20534, section 3.2.3).
"""

from __future__ import annotations

from torch import Tensor

from k2rl.objective.base import PolicyLossInputs, PolicyLossOutput


def k2_loss(inputs: PolicyLossInputs, tau: float) -> PolicyLossOutput:
    r"""Squared policy loss on sequence level.

    With `A_i = r_i - mean(r)` of sequence i's group and the log-ratio
    `d_i = sum_t [ log pi_theta(y_it) - log pi_old(y_it) ]` over its sampled tokens,

        loss = 1 / (2 tau N) * sum_i (A_i - tau d_i)^2

    whose gradient is `-1/N sum_i (A_i - tau d_i) * grad log pi_theta(y_i)`. The papers print the square
    without `1/(2 tau)`; its gradient is `2 tau` times the policy gradient (k1.5 states the gradient
    without that factor), which would couple the learning rate to tau. Dividing keeps tau what it is
    meant to be: the strength of the pull towards the behaviour policy.

    Args:
        inputs: the sampled tokens of a micro-batch.
        tau: regularisation strength, greater than 0. K2 publishes no value.

    Returns:
        The loss, and the metrics `behaviour_kl` (mean of -d_i: an estimate of KL(behaviour || policy) in
        nats a sequence) and `regulariser` (mean of tau d_i^2 / 2: the penalty's share of the loss).

    Raises:
        ValueError: if tau is not positive.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau} must be greater than 0")
    log_ratio = inputs.sequence_sum(inputs.logprobs - inputs.behaviour_logprobs)
    residual = inputs.advantages - tau * log_ratio
    loss = residual.square().sum() / (2 * tau * inputs.num_sequences_total)
    return PolicyLossOutput(loss, _metrics(log_ratio, tau, inputs.num_sequences_total))


def k2_token_loss(inputs: PolicyLossInputs, tau: float) -> PolicyLossOutput:
    r"""The same square for each token by itself, averaged over all T tokens of the batch.

    With `d_t = log pi_theta(y_t) - log pi_old(y_t)` and its sequence's advantage A,

        loss = 1 / (2 tau T) * sum_t (A - tau d_t)^2

    The pull back to the behaviour policy no longer grows with a sequence's length; what it bounds is each
    token's log-ratio, not the sequence's. Ours: neither report has it.

    Args and errors as `k2_loss`; the metrics are means over tokens.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau} must be greater than 0")
    log_ratio = inputs.logprobs - inputs.behaviour_logprobs
    residual = inputs.token_advantages - tau * log_ratio
    loss = residual.square().sum() / (2 * tau * inputs.num_tokens_total)
    return PolicyLossOutput(loss, _metrics(log_ratio, tau, inputs.num_tokens_total))


def _metrics(log_ratio: Tensor, tau: float, total: int) -> dict[str, Tensor]:
    detached = log_ratio.detach()
    return {
        "behaviour_kl": -detached.sum() / total,
        "regulariser": 0.5 * tau * detached.square().sum() / total,
    }
