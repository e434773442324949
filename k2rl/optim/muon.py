"""Muon for matrices and AdamW for everything else, as one optimizer.

Muon: Kimi K2 (arXiv 2507.20534, section 2.1, Algorithm 1 without QK-Clip) and Moonlight
(arXiv 2502.16982, section 2.2; 2.3 for sharded parameters). AdamW: arXiv 1711.05101.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from k2rl.config import OptimizerConfig
from k2rl.errors import ConfigError
from k2rl.optim.exchange import Matrix, Piece, Sharding, plan_waves, run_waves
from k2rl.optim.matrices import Box, boxes_of, is_muon_matrix
from k2rl.optim.newton_schulz import default_dtype, orthogonalise

RMS_SCALE = 0.2
"""Moonlight, section 2.2: AdamW's typical update RMS, which Muon's is scaled to."""


class MuonAdamW(torch.optim.Optimizer):
    """Each param group has an `algorithm`: `muon` or `adamw`.

    Muon, for a matrix W of shape n x m with gradient G:

        M = mu M + G
        O = newton_schulz(G + mu M if nesterov else M) * 0.2 * sqrt(max(n, m))
        W = W - lr (O + weight_decay W)

    so an update has an RMS of about 0.2 lr whatever the shape. A parameter may hold several matrices
    (`boxes`: for each parameter of the group the matrices in it; default: each parameter is one).

    Parameters may be DTensors that FSDP2 has sharded. Momentum and AdamW's state are then sharded alike,
    `step` is a collective of all ranks, and every rank must have gradients of the same parameters.

    Raises:
        ValueError: if a `muon` group holds anything but matrices and stacks of them.
    """

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self._boxes: dict[Tensor, tuple[Box, ...]] = {}
        for group in param_groups:
            group["params"] = list(group["params"])
            if group["algorithm"] not in ("muon", "adamw"):
                raise ValueError(f"unknown algorithm {group['algorithm']!r}")
            if group["algorithm"] == "muon":
                self._add_boxes(group["params"], group.pop("boxes", None))
        super().__init__(param_groups, {})
        self._plans: dict[tuple[int, ...], list[_Plan]] = {}

    def _add_boxes(self, params: Sequence[Tensor], boxes: Sequence[tuple[Box, ...]] | None) -> None:
        for parameter in params:
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices, not parameters of shape {tuple(parameter.shape)}")
        if boxes is None:
            boxes = [boxes_of("", tuple(parameter.shape)) for parameter in params]
        self._boxes.update(zip(params, boxes, strict=True))

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
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        for plan in self._planned(params):
            members = [params[index] for index in plan.members]
            momenta = [self.state[member]["momentum"] for member in members]
            _MuonUpdate(members, momenta, group).run(plan.waves, plan.across)

    def _planned(self, params: Sequence[Tensor]) -> list[_Plan]:
        """Who works on which matrix; the same for the same parameters at every step."""
        key = tuple(id(parameter) for parameter in params)
        if key not in self._plans:
            shardings = [Sharding.of(parameter) for parameter in params]
            by_mesh: dict[Sharding, list[int]] = defaultdict(list)
            for index, sharding in enumerate(shardings):
                by_mesh[sharding.across].append(index)
            self._plans[key] = [
                _Plan(
                    members,
                    across,
                    plan_waves(
                        [tuple(params[index].shape) for index in members],
                        [self._boxes[params[index]] for index in members],
                        [shardings[index] for index in members],
                    ),
                )
                for across, members in by_mesh.items()
            ]
        return self._plans[key]

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if not state:
                # Where the parameter is: the fused kernel reads it there.
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in params]
        adamw(
            [_local(parameter) for parameter in params],
            [_local(parameter.grad) for parameter in params if parameter.grad is not None],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
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


@dataclass(frozen=True)
class _Plan:
    """For parameters that are sharded over the same ranks."""

    #: Indices into the parameters.
    members: list[int]
    across: Sharding
    waves: list[list[Matrix]]


class _MuonUpdate:
    """One update of parameters that are sharded over the same ranks."""

    def __init__(self, params: Sequence[Tensor], momenta: Sequence[Tensor], group: dict[str, Any]) -> None:
        self._weights = [_local(parameter) for parameter in params]
        self._gradients = [_local(parameter.grad) for parameter in params if parameter.grad is not None]
        self._momenta = [_local(momentum) for momentum in momenta]
        self._group = group

    def run(self, waves: Sequence[Sequence[Matrix]], across: Sharding) -> None:
        torch._foreach_mul_(self._momenta, self._group["momentum"])
        torch._foreach_add_(self._momenta, self._gradients)
        if self._group["weight_decay"]:
            torch._foreach_mul_(self._weights, 1 - self._group["lr"] * self._group["weight_decay"])
        device = self._weights[0].device
        dtype = default_dtype(device)
        work = partial(orthogonalise, steps=self._group["ns_steps"], dtype=dtype)
        run_waves(waves, across, self._take, work, self._give, dtype, device)

    def _take(self, matrices: Sequence[Matrix], pieces: Sequence[Piece]) -> list[Tensor]:
        """Momentum's answer to the gradient, before orthogonalisation."""
        momenta = _views(self._momenta, matrices, pieces)
        if not (self._group["nesterov"] and momenta):
            return momenta
        gradients = _views(self._gradients, matrices, pieces)
        return list(torch._foreach_add(gradients, momenta, alpha=self._group["momentum"]))

    def _give(self, matrices: Sequence[Matrix], pieces: Sequence[Piece], updates: list[Tensor]) -> None:
        """Move the weights against the orthogonalised directions."""
        weights = _views(self._weights, matrices, pieces)
        by_side: dict[int, list[int]] = defaultdict(list)
        for index, matrix in enumerate(matrices):
            by_side[max(matrix.shape)].append(index)
        for side, members in by_side.items():
            torch._foreach_add_(
                [weights[index] for index in members],
                [updates[index] for index in members],
                alpha=-self._group["lr"] * RMS_SCALE * math.sqrt(side),
            )


def _views(tensors: Sequence[Tensor], matrices: Sequence[Matrix], pieces: Sequence[Piece]) -> list[Tensor]:
    return [_view(tensors[m.parameter], piece) for m, piece in zip(matrices, pieces, strict=True)]


def _view(held: Tensor, piece: Piece) -> Tensor:
    expert, rows, columns = piece.in_shard
    whole = held if held.ndim == 2 else held[expert]
    return whole if piece.shape == whole.shape else whole[rows, columns]  # slices cost a GPU's host dear


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_optimizer(
    named_params: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    lr: float,
    model: nn.Module | None = None,
) -> MuonAdamW:
    """The optimizer that `config` names, over trainable parameters under their checkpoint names.

    Norms and biases are not decayed. A fresh optimizer has no state until its first step.

    Args:
        named_params: parameters or masters of them, plain or sharded by FSDP2.
        config: which optimizer.
        lr: learning rate of all groups.
        model: whose modules tell how fused projections are laid out; see `boxes_of`.

    Raises:
        ConfigError: if there is no optimizer of that name.
    """
    if config.name not in ("muon", "adamw"):
        raise ConfigError(f"optimizer.name={config.name!r} is not one of: muon, adamw")
    matrices, boxes, decayed, vectors = [], [], [], []
    for name, parameter in named_params:
        if config.name == "muon" and is_muon_matrix(name, parameter):
            matrices.append(parameter)
            boxes.append(boxes_of(name, tuple(parameter.shape), model))
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
        {"params": matrices, "boxes": boxes, **muon, "weight_decay": config.weight_decay},
        {"params": decayed, **adam, "weight_decay": config.weight_decay},
        {"params": vectors, **adam, "weight_decay": 0.0},
    ]
    return MuonAdamW([group for group in groups if group["params"]])
