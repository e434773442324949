"""The rubric of environments that score themselves."""

from __future__ import annotations

import math

from k2rl.types import Trajectory, Verdict
from rubrics.base import Rubric


class EnvironmentReward(Rubric):
    """The sum of the environment's step rewards, with the components it named."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        """Promise that the summed reward of an episode lies between `low` and `high`.

        Raises:
            ValueError: if that is no interval of finite numbers.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"the reward range ({low}, {high}) must be finite and not empty")
        self.reward_range = (float(low), float(high))

    async def judge(self, trajectory: Trajectory) -> Verdict:
        return Verdict.scored(trajectory.env_reward, trajectory.reward_components)
