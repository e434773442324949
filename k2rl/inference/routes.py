"""Which experts a model on a CPU chooses for each token, noted inside vLLM's worker.

vLLM itself hands them out (`enable_return_routed_experts`) with its Model Runner V2 alone; that needs Triton,
and is not there on a CPU. Routers tell what they choose there, too; what is missing is whose token it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

#: In vLLM's `additional_config`: whether workers record.
RECORD_ROUTES = "k2rl_record_routes"


class RouteRecorder:
    """Follows the batches of a model runner; a route is [layers * experts a token] uint16, dense layers zero.

    Each request computes all of its positions: on a CPU, vLLM has no prefix cache for latent attention.
    """

    def __init__(self, model: nn.Module, runner: Any) -> None:
        """Listen to the routers of a model.

        Args:
            model: vLLM's.
            runner: its model runner, V1.

        Raises:
            ValueError: the model has no routers, or ones that do not tell.
        """
        routers = {m.layer_id: m.router for m in model.modules() if isinstance(m, MoERunner)}
        if not routers or not all(isinstance(router, BaseRouter) for router in routers.values()):
            raise ValueError(
                "inference.return_routed_experts: vLLM's model has no routers that say what they choose"
            )
        config = runner.model_config
        self._runner = runner
        self._shape = (config.get_total_num_hidden_layers(), next(iter(routers.values())).top_k)
        self._chosen: dict[int, Tensor] = {}
        for layer, router in routers.items():
            router.set_capture_fn(partial(self._choose, layer))
        self._of_requests: dict[str, list[bytes]] = {}

    def _choose(self, layer: int, experts: Tensor) -> None:
        self._chosen[layer] = experts

    def note(self) -> None:
        """After a batch was computed, and before the next one is begun."""
        if not self._chosen:
            return
        batch = self._runner.input_batch
        ends = self._runner.query_start_loc.np[1 : batch.num_reqs + 1]
        tokens = int(ends[-1])
        routes = np.zeros((tokens, *self._shape), dtype=np.uint16)
        for layer, experts in self._chosen.items():
            routes[:, layer] = experts.numpy()
        self._chosen.clear()
        rows = [row.tobytes() for row in routes]
        first = 0
        for index, (name, end) in enumerate(zip(batch.req_ids[: batch.num_reqs], ends.tolist(), strict=True)):
            self._append(name, int(batch.num_computed_tokens_cpu[index]), rows[first:end])
            first = end

    def _append(self, name: str, start: int, rows: Sequence[bytes]) -> None:
        known = self._of_requests.setdefault(name.rpartition("-")[0], [])
        if start > len(known):
            raise RuntimeError(
                f"{name}: nobody knows which experts computed positions {len(known)} to {start}"
            )
        del known[start:]  # fewer are left after a preemption
        known += rows

    def take(self, requests: Sequence[str]) -> dict[str, list[bytes]]:
        """What was noted of requests that have ended, position by position; it is forgotten here."""
        return {name: self._of_requests.pop(name) for name in requests if name in self._of_requests}
