"""The policy losses by their names in the configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from k2rl.config import ObjectiveConfig
from k2rl.objective.base import PolicyLoss, PolicyLossOutput
from k2rl.objective.cispo import cispo_loss
from k2rl.objective.clipped import clipped_loss
from k2rl.objective.correction import masked, truncated
from k2rl.objective.gspo import gspo_loss
from k2rl.objective.k2 import k2_loss, k2_token_loss
from k2rl.objective.k2_5 import k2_5_loss
from k2rl.objective.kl import with_kl
from k2rl.objective.parameters import PARAMETERS, check_objective
from k2rl.objective.reinforce import reinforce_loss

_LOSSES: dict[str, Callable[..., PolicyLossOutput]] = {
    "k2": k2_loss,
    "k2_token": k2_token_loss,
    "k2_5": k2_5_loss,
    "clipped": clipped_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "reinforce": reinforce_loss,
}

_CORRECTIONS: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "truncated": truncated,
    "masked": masked,
}


def build_policy_loss(config: ObjectiveConfig) -> PolicyLoss:
    """The loss that `config` names, with its parameters bound, and its KL to a reference.

    Raises:
        ConfigError: see `check_objective`.
    """
    check_objective(config)
    parameters: dict[str, Any] = {name: getattr(config, name) for name in PARAMETERS[config.name]}
    cap = parameters.pop("correction_cap", None)
    if config.correction is not None:
        parameters["correction"] = partial(_CORRECTIONS[config.correction], cap=cap)
    loss = partial(_LOSSES[config.name], **parameters)
    return with_kl(loss, config.kl_weight, config.kl_estimator) if config.kl_weight else loss
