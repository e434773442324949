"""Advantages of a group of responses to one prompt. No torch: the driver computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(
    rewards: Sequence[float], baseline: str = "mean", tau: float | None = None
) -> list[float]:
    """Reward minus a baseline of the group.

    - `mean`: the group's mean; K2 (arXiv 2507.20534, section 3.2.3).
    - `leave_one_out`: the mean of the others, which makes `K / (K - 1)` times that (RLOO, arXiv 2402.14740).
    - `normalised`: the mean; then divided by the sample's standard deviation (GRPO, arXiv 2402.03300).
    - `exponential`: `tau log mean exp(r / tau)`, of which k1.5 (arXiv 2501.12599, section 2.3.2) takes the
      mean as the limit for large tau. It is nearer to the best reward.

    Args:
        rewards: one finite reward a response; failed episodes are left out by the caller.
        baseline: one of the above.
        tau: of the objective, above 0; for `exponential`.

    Returns:
        One advantage a response, in order. All zero, exactly, where the rewards are all equal, as in a group
        of one.

    Raises:
        ValueError: if the group is empty, a reward is not finite, or there is no such baseline.
    """
    if not rewards:
        raise ValueError("an empty group has no mean reward")
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"reward {index} of the group is {reward}, not a finite number")
    if is_uniform(rewards):
        return [0.0] * len(rewards)
    count = len(rewards)
    if baseline == "exponential":
        if tau is None or not tau > 0:
            raise ValueError(f"the exponential baseline needs a tau above 0, not {tau}")
        best = max(rewards)
        mass = math.fsum(math.exp((reward - best) / tau) for reward in rewards)
        value = best + tau * math.log(mass / count)
        return [reward - value for reward in rewards]
    mean = math.fsum(rewards) / count
    advantages = [reward - mean for reward in rewards]
    scale = 1.0
    if baseline == "leave_one_out":
        scale = count / (count - 1)
    elif baseline == "normalised":
        # Halved exponents: rewards as small as 1e-200 are still told apart.
        largest = max(map(abs, advantages))
        scale = 1 / largest / math.sqrt(math.fsum((a / largest) ** 2 for a in advantages) / (count - 1))
    elif baseline != "mean":
        raise ValueError(f"there is no baseline {baseline!r}")
    return [advantage * scale for advantage in advantages]


def is_uniform(rewards: Sequence[float]) -> bool:
    """True where all rewards are equal: on policy, such a group has no gradient."""
    return all(reward == rewards[0] for reward in rewards)
