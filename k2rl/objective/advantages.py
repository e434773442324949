"""Advantages of a group of responses to one prompt. No torch: the driver computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Reward minus the group's mean reward, K2's baseline (arXiv 2507.20534, section 3.2.3).

    Not divided by the standard deviation: the objective compares rewards with log-ratios, so their
    scale has a meaning.

    Args:
        rewards: one finite reward a response; failed episodes are left out by the caller.

    Returns:
        One advantage a response, in order; they sum to 0 up to rounding. All zero, exactly, where the
        rewards are all equal.

    Raises:
        ValueError: if the group is empty or a reward is not finite.
    """
    if not rewards:
        raise ValueError("an empty group has no mean reward")
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"reward {index} of the group is {reward}, not a finite number")
    if is_uniform(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def is_uniform(rewards: Sequence[float]) -> bool:
    """True where all rewards are equal: on policy, such a group has no gradient."""
    return all(reward == rewards[0] for reward in rewards)
