"""The policy losses by their names in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from k2rl.config import ObjectiveConfig
from k2rl.errors import ConfigError
from k2rl.objective.base import PolicyLoss
from k2rl.objective.k2 import k2_loss

_BUILDERS: dict[str, Callable[[ObjectiveConfig], PolicyLoss]] = {
    "k2": lambda config: partial(k2_loss, tau=config.tau),
}


def build_policy_loss(config: ObjectiveConfig) -> PolicyLoss:
    """The loss that `config` names, with its parameters bound.

    Raises:
        ConfigError: if there is no loss of that name.
    """
    if config.name not in _BUILDERS:
        raise ConfigError(f"objective.name={config.name!r} is not one of: {', '.join(_BUILDERS)}")
    return _BUILDERS[config.name](config)
