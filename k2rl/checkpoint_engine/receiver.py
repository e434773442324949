"""The receiving end inside a vLLM worker: a weight-transfer engine that reads the shared arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from k2rl.checkpoint_engine.arena import read_arena
from k2rl.checkpoint_engine.manifest import Manifest, WeightTransferError

BACKEND = "k2rl_shared_memory"


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: each push carries its manifest."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One push: a `Manifest` as builtin values (it crosses vLLM's own serialisation)."""

    manifest: dict[str, Any]


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Verifies and loads a push in place, through vLLM's layerwise reload.

    Works for packed CPU linears too, whose plain `load_weights` fails after the first load.
    """

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        pass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Now, while tied parameters are one: a push that broke off leaves them apart.
        self._expected = {name for name, _ in self.model.named_parameters()}

    def start_weight_update(self) -> None:
        self._loaded: set[str] = set()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it synchronises a CUDA device after each chunk.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        manifest = msgspec.convert(update_info.manifest, Manifest)
        self._loaded |= self.model.load_weights(iter(read_arena(manifest)))

    def finish_weight_update(self) -> None:
        """Raises:
        WeightTransferError: a parameter of the model was in no push; it would keep its old value.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        _refresh_packed_linears(self.model)
        missing = sorted(self._expected - self._loaded)
        if missing:
            raise WeightTransferError(f"{len(missing)} parameters were not updated, such as {missing[0]}")

    def shutdown(self) -> None:
        pass


def _refresh_packed_linears(model: Any) -> None:
    """Rebuild CPU linears that still multiply with a packed copy of the old weights.

    The tied `lm_head` is such a one: the layerwise reload updates its parameter and misses the copy.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if "cpu_linear" in module.__dict__ and module.weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)
