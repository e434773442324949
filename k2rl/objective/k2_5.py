"""Kimi K2.5's policy objective: importance-weighted tokens, masked where policy and behaviour drift apart."""

from __future__ import annotations

from k2rl.objective.base import PolicyLossInputs, PolicyLossOutput


def k2_5_loss(
    inputs: PolicyLossInputs, tau: float, log_ratio_min: float, log_ratio_max: float
) -> PolicyLossOutput:
    r"""Token-level loss of the Kimi K2.5 report (section on reinforcement learning).

    With `d_t = log pi_theta(y_t) - log pi_old(y_t)`, its sequence's advantage A and T tokens in the batch,

        loss = -1/T sum_t [ clip(exp(d_t), exp(log_ratio_min), exp(log_ratio_max)) A - tau d_t^2 ]

    A token whose log-ratio has left the interval has no gradient of the first term, whatever the sign of its
    advantage (PPO lets it come back in; here the mismatch of trainer and inference engine is what is cut
    off, too). The second term pulls it back.

    Args:
        inputs: the sampled tokens of a micro-batch.
        tau: strength of the pull, at least 0. K2.5 publishes no values for it or the interval.
        log_ratio_min: below 0, in nats.
        log_ratio_max: above 0, in nats.

    Returns:
        The loss, and the metrics `behaviour_kl` (mean of -d_t), `regulariser` (mean of tau d_t^2) and
        `clipped` (share of tokens outside the interval).
    """
    log_ratio = inputs.logprobs - inputs.behaviour_logprobs
    weighted = log_ratio.clamp(log_ratio_min, log_ratio_max).exp() * inputs.token_advantages
    loss = inputs.average(tau * log_ratio.square() - weighted, over="tokens")
    detached = log_ratio.detach()
    return PolicyLossOutput(
        loss,
        {
            "behaviour_kl": inputs.average(-detached, over="tokens"),
            "regulariser": inputs.average(tau * detached.square(), over="tokens"),
            "clipped": inputs.share((detached < log_ratio_min) | (detached > log_ratio_max)),
        },
    )
