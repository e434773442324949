"""Gym-style text environments: tasks, tools and rewards for a language model."""

from envs.base import ResetResult, StepResult, TextEnv, maybe_await
from envs.registry import available, broken, make, register_with_gymnasium, resolve, rubric_of

register_with_gymnasium()

__all__ = [
    "ResetResult",
    "StepResult",
    "TextEnv",
    "available",
    "broken",
    "make",
    "maybe_await",
    "resolve",
    "rubric_of",
]
