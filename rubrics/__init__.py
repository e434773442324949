"""Turn an episode into a reward."""

from rubrics.base import Rubric, judge_safely
from rubrics.environment import EnvironmentReward

__all__ = ["EnvironmentReward", "Rubric", "judge_safely"]
