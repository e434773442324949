"""Muon for matrices and AdamW for everything else, as one optimizer.

Muon: Kimi K2 (arXiv 2507.20534, section 2.1, Algorithm 1 without QK-Clip) and Moonlight
(arXiv 2502.16982, section 2.2). AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from k2rl.config import OptimizerConfig
from k2rl.errors import ConfigError
from k2rl.optim.newton_schulz import newton_schulz

RMS_SCALE = 0.2
"""Moonlight, section 2.2: AdamW's typical update RMS, which Muon's is scaled to."""


class MuonAdamW(torch.optim.Optimizer):
    """Each param group has an `algorithm`: `muon` (matrices only) or `adamw`.

    Muon, for a matrix W of shape n x m with gradient G:

        M = mu M + G
        O = newton_schulz(G + mu M if nesterov else M) * 0.2 * sqrt(max(n, m))
        W = W - lr (O + weight_decay W)

    so an update has an RMS of about 0.2 lr whatever the shape.

    Raises:
        ValueError: if a `muon` group holds anything but matrices.
    """

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        super().__init__(param_groups, {})
        for group in self.param_groups:
            if group["algorithm"] not in ("muon", "adamw"):
                raise ValueError(f"unknown algorithm {group['algorithm']!r}")
            for parameter in group["params"]:
                if group["algorithm"] == "muon" and parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, not parameters of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params and group["algorithm"] == "muon":
                self._muon(params, group)
            elif params:
                self._adamw(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            update = newton_schulz(self._direction(parameter, group), group["ns_steps"])
            if group["weight_decay"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * RMS_SCALE * math.sqrt(max(parameter.shape)))

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Momentum's answer to the gradient, before orthogonalisation."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        momentum.mul_(group["momentum"]).add_(gradient)
        return gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in params]
        adamw(
            params,
            [parameter.grad for parameter in params if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,  # one pass over memory; on CPU this is what the step costs
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: 2-D and neither embedding nor output head (Moonlight, section 2.2)."""
    embedding = any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
    return parameter.ndim == 2 and not embedding


def build_optimizer(
    named_params: Iterable[tuple[str, Tensor]], config: OptimizerConfig, lr: float
) -> MuonAdamW:
    """The optimizer that `config` names, over trainable parameters under their checkpoint names.

    Norms and biases are not decayed. A fresh optimizer has no state until its first step.

    Raises:
        ConfigError: if there is no optimizer of that name.
    """
    if config.name not in ("muon", "adamw"):
        raise ConfigError(f"optimizer.name={config.name!r} is not one of: muon, adamw")
    matrices, decayed, vectors = [], [], []
    for name, parameter in named_params:
        if config.name == "muon" and is_muon_matrix(name, parameter):
            matrices.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            vectors.append(parameter)
    adam = {"algorithm": "adamw", "lr": lr, "betas": tuple(config.betas), "eps": config.eps}
    muon = {
        "algorithm": "muon",
        "lr": lr,
        "momentum": config.momentum,
        "nesterov": config.nesterov,
        "ns_steps": config.ns_steps,
    }
    groups: list[dict[str, Any]] = [
        {"params": matrices, **muon, "weight_decay": config.weight_decay},
        {"params": decayed, **adam, "weight_decay": config.weight_decay},
        {"params": vectors, **adam, "weight_decay": 0.0},
    ]
    return MuonAdamW([group for group in groups if group["params"]])
