"""Experts kept equally busy by a bias on the router's choice, without an auxiliary loss.

DeepSeek V3 (arXiv 2412.19437, section 2.1.2), whose architecture Kimi K2 has: after each step the bias of an
expert that more tokens than average have chosen falls by `rate`, and of one that fewer have, rises. The bias
decides which experts a token goes to and never how much they count for, so that no gradient comes of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

BIAS = "e_score_correction_bias"


class RouterBalance:
    """Counts what the routers of a model choose in passes that make gradients, and moves their biases."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Args:
        model: as transformers builds it; its routers are the modules with a bias of that name.
        rate: by which a bias moves in a step; 0 leaves them as they are, and still measures.
        """
        self._rate = rate
        self._routers = {name: module for name, module in model.named_modules() if hasattr(module, BIAS)}
        experts = max((getattr(router, BIAS).numel() for router in self._routers.values()), default=0)
        device = next((getattr(router, BIAS).device for router in self._routers.values()), None)
        #: Where the routers are: to fetch each choice of a GPU's would make it wait.
        self._counts = torch.zeros(len(self._routers), experts, dtype=torch.float64, device=device)
        for row, router in enumerate(self._routers.values()):
            router.register_forward_hook(partial(self._count, row))

    @property
    def biases(self) -> dict[str, Tensor]:
        """float32 [experts], by the checkpoint's names."""
        return {f"{name}.{BIAS}": getattr(router, BIAS) for name, router in self._routers.items()}

    def _count(self, row: int, router: nn.Module, arguments: Any, output: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            chosen = output[-1].detach().flatten()  # logits, weights, indices
            ones = torch.ones_like(chosen, dtype=self._counts.dtype)
            self._counts[row].index_add_(0, chosen, ones)

    def take(self) -> Tensor:
        """[routers, experts] float64 on the CPU: how often each expert was chosen since the last call."""
        taken = self._counts.to("cpu", copy=True)
        self._counts.zero_()
        return taken

    @torch.no_grad()
    def update(self, counts: Tensor) -> dict[str, float]:
        """Move the biases.

        Args:
            counts: as `take` gives them, of all ranks together.

        Returns:
            Over all routers: `router/max_load` and `router/min_load`, the busiest and the idlest expert's
            share of the tokens as a multiple of an equal share, and `router/unused_share`, of experts that
            no token has chosen. Nothing if the model has no routers.
        """
        if not self._routers or not counts.sum():
            return {}
        mean = counts.mean(dim=1, keepdim=True)
        for bias, moves in zip(self.biases.values(), torch.sign(mean - counts), strict=True):
            bias.add_(moves.to(bias), alpha=self._rate)
        loads = counts / mean.clamp(min=1)
        return {
            "router/max_load": float(loads.max()),
            "router/min_load": float(loads.min()),
            "router/unused_share": float((counts == 0).double().mean()),
        }
