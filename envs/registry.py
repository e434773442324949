"""Environments by id: built in, of packages (entry points `k2rl.envs`), Gymnasium's, `module:Class`.

Gymnasium's ids are those that `gymnasium.register` was given for subclasses of `TextEnv`; ours are there
as `k2rl/<id>-v0`. `module:namespace/Name-v0` imports the module that registers one.
"""

from __future__ import annotations

from typing import Any

import gymnasium

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
        "agent": "envs.agents:FunctionAgentEnv",
        "agent_command": "envs.agents:CommandAgentEnv",
        "calculator": "envs.calculator:CalculatorEnv",
        "code_contest": "envs.coding.single_turn:ContestEnv",
        "code_debug": "envs.coding.debugging:DebugEnv",
        "code_function": "envs.coding.single_turn:CodeEnv",
        "comparison": "envs.games.comparison:ComparisonEnv",
        "customer_service": "envs.customer_service.env:ServiceEnv",
        "gymnasium": "envs.adapters.gymnasium:GymnasiumTextEnv",
        "harbor": "envs.coding.harbor:HarborEnv",
        "openenv": "envs.adapters.openenv:OpenEnvEnv",
        "python_math": "envs.python_math:PythonMathEnv",
        "remote": "envs.service.remote:RemoteEnv",
        "reasoning_gym": "envs.reasoning_gym:ReasoningGymEnv",
        "sudoku": "envs.games.sudoku:SudokuEnv",
        "swe": "envs.coding.swe:SweEnv",
        "textarena": "envs.adapters.textarena:TextArenaEnv",
        "twenty_four": "envs.games.twenty_four:TwentyFourEnv",
        "wording": "envs.games.wording:WordingEnv",
    },
    listing="`k2rl envs list` shows all",
)


def make(id: str, /, **kwargs: Any) -> TextEnv:
    """An environment by id, built with these arguments.

    Raises:
        ConfigError: one line, if the id, its class or the arguments are wrong.
    """
    target, given = _of_gymnasium(id)
    return _REGISTRY.make(target, {**given, **kwargs})


def resolve(id: str) -> type[TextEnv]:
    """The class behind an environment id.

    Raises:
        ConfigError: one line, if there is no usable one.
    """
    return _REGISTRY.resolve(_of_gymnasium(id)[0])


def _of_gymnasium(id: str) -> tuple[str, dict[str, Any]]:
    """What an id of Gymnasium stands for: `module:Class` and arguments; other ids stand for themselves.

    Raises:
        ConfigError: nobody has registered it.
    """
    module, _, name = id.rpartition(":")
    if "/" not in name:
        return id, {}
    if module:
        _REGISTRY.import_module(module, id)
    spec = gymnasium.registry.get(name)
    if spec is None or spec.entry_point is None:
        raise ConfigError(
            f"unknown environment {id!r}: gymnasium.register was not called for it; name the module that "
            "does so: module:namespace/Name-v0"
        )
    entry = spec.entry_point
    target = entry if isinstance(entry, str) else f"{entry.__module__}:{getattr(entry, '__qualname__', '?')}"
    return target, dict(spec.kwargs)


def register_with_gymnasium() -> None:
    """Make the built-in environments known to `gymnasium.make`, as `k2rl/<id>-v0`."""
    for id, target in _REGISTRY.builtin.items():
        if f"k2rl/{id}-v0" not in gymnasium.registry:
            gymnasium.register(f"k2rl/{id}-v0", entry_point=target)


def broken() -> dict[str, ConfigError]:
    """Every registered id that cannot be used, with the reason."""
    return _REGISTRY.broken()


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
