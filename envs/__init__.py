"""Gym-style text environments: tasks, tools and rewards for a language model."""

from envs.base import ResetResult, StepResult, TextEnv, maybe_await
from envs.registry import available, make, resolve, rubric_of

__all__ = ["ResetResult", "StepResult", "TextEnv", "available", "make", "maybe_await", "resolve", "rubric_of"]
