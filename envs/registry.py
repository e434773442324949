"""Environments by id: built in, from installed packages (entry points `k2rl.envs`), or `module:Class`."""

from __future__ import annotations

from typing import Any

import rubrics.registry
from envs.base import TextEnv
from k2rl.errors import ConfigError
from rubrics.base import Rubric
from rubrics.plugins import Registry

_REGISTRY: Registry[TextEnv] = Registry(
    noun="environment",
    base=TextEnv,
    group="k2rl.envs",
    builtin={
        "calculator": "envs.calculator:CalculatorEnv",
        "code_contest": "envs.coding.single_turn:ContestEnv",
        "code_debug": "envs.coding.debugging:DebugEnv",
        "code_function": "envs.coding.single_turn:CodeEnv",
        "harbor": "envs.coding.harbor:HarborEnv",
        "reasoning_gym": "envs.reasoning_gym:ReasoningGymEnv",
        "swe": "envs.coding.swe:SweEnv",
    },
    listing="`k2rl envs list` shows all",
)


def make(id: str, /, **kwargs: Any) -> TextEnv:
    """An environment by id, built with these arguments.

    Raises:
        ConfigError: one line, if the id, its class or the arguments are wrong.
    """
    return _REGISTRY.make(id, kwargs)


def resolve(id: str) -> type[TextEnv]:
    """The class behind an environment id.

    Raises:
        ConfigError: one line, if there is no usable one.
    """
    return _REGISTRY.resolve(id)


def available() -> dict[str, str]:
    """Every registered id with its description."""
    return _REGISTRY.available()


def rubric_of(env: TextEnv, id: str = "env", /, **kwargs: Any) -> Rubric:
    """The rubric that judges an environment's episodes: `env` for its own, or another one by id.

    Raises:
        ConfigError: one line, if the id, its class or the arguments are wrong.
    """
    if id != "env":
        return rubrics.registry.make(id, **kwargs)
    if kwargs:
        raise ConfigError(
            f"rubric 'env' is built by the environment and takes no arguments, but got: {', '.join(kwargs)}"
        )
    if not isinstance(env.rubric, Rubric):
        raise ConfigError(f"{type(env).__name__}.rubric is {env.rubric!r}, not a rubrics.base.Rubric")
    return env.rubric
