"""Router replay: the trainer sends each token to the experts that the inference engine sent it to.

Both have the same routers, but round otherwise: where two experts are about as good, they may choose
differently, and then compute something else (R3, arXiv 2510.11370).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from k2rl.optim.router_balance import BIAS
from k2rl.training.loading import layers_of


class RouterReplay:
    """Chooses in place of a model's routers; how much an expert counts for is still the router's to say.

    Routers are those of DeepSeek V3 and Kimi K2: sigmoids of the chosen experts' logits, with a sum of 1.
    """

    def __init__(self, model: Any) -> None:
        """Before others look at what the routers choose."""
        self._routes: Tensor | None = None
        #: By layer since `use`, where they were counted: to fetch each would make a GPU wait.
        self._known: list[Tensor] = []
        self._others: list[Tensor] = []
        for number, layer in enumerate(layers_of(model)):
            for router in layer.modules():
                if hasattr(router, BIAS):
                    router.register_forward_hook(partial(self._replay, number))

    def use(self, routes: Tensor | None) -> None:
        """From here on, also when layers are computed again in a backward pass.

        Args:
            routes: see `MicroBatch.routes`.
        """
        self._routes = routes
        self._known, self._others = [], []

    @property
    def choices(self) -> int:
        """Choices for a token in a layer since `use`."""
        return int(sum(self._known))

    @property
    def other_choices(self) -> int:
        """How many of them the router had made otherwise."""
        return int(sum(self._others))

    def _replay(self, layer: int, router: nn.Module, arguments: Any, output: Any) -> Any:
        if self._routes is None:
            return None
        logits, weights, own = output
        size = own.shape[1]
        told = self._routes[:, layer * size : (layer + 1) * size]
        known = told[:, :1] >= 0
        chosen = torch.where(known, told, own)
        self._known.append(known.sum())
        self._others.append((chosen.sort(1).values != own.sort(1).values).any(1).sum())
        scores = logits.sigmoid().gather(1, chosen)
        if router.norm_topk_prob:
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, (scores * router.routed_scaling_factor).to(weights.dtype), chosen
