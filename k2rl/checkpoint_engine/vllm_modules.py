"""What vLLM's layers do with weights after they are loaded, and how to make them do it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    _copy_and_restore_kernel_tensors,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers
from vllm.platforms import current_platform

from k2rl.checkpoint_engine.copies import Writes
from k2rl.checkpoint_engine.regions import View


def keeps_layout(module: torch.nn.Module) -> bool:
    """Whether the parameters stay as they were loaded; what else is made of them is made anew by others."""
    method = getattr(module, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return True
    if type(method) is UnquantizedEmbeddingMethod:
        return True  # on CPU it packs a copy: `refresh_packed`
    if type(method) is UnquantizedLinearMethod:
        if current_platform.is_cpu():
            return bool(getattr(module, "_cpu_skip_gemm_dispatch", False))
        return bool(current_platform.is_cuda())
    if type(method) is UnquantizedFusedMoEMethod:
        return bool(current_platform.is_cuda() and method.unquantized_backend == UnquantizedMoeBackend.TRITON)
    return False


def moves_experts(module: Any) -> bool:
    """Whether vLLM balances load by giving experts other places: a record would put them in the old ones."""
    moe = getattr(module, "moe_config", None)
    return moe is not None and bool(moe.moe_parallel_config.enable_eplb)


def is_padded(module: Any) -> bool:
    """Whether the parameters of experts are larger than what a checkpoint has for them."""
    moe = getattr(module, "moe_config", None)
    if moe is None:
        return False
    sizes = (
        (moe.hidden_dim, moe.hidden_dim_unpadded),
        (moe.intermediate_size_per_partition, moe.intermediate_size_per_partition_unpadded),
    )
    return any(loaded is not None and loaded != size for size, loaded in sizes)


def prepare_reload(modules: Iterable[torch.nn.Module]) -> None:
    """Before modules are processed again: undo what would make them do it differently than the first time."""
    for module in modules:
        method = getattr(module, "quant_method", None)
        if current_platform.is_cpu() and isinstance(method, UnquantizedFusedMoEMethod):
            # With a kernel in place it would leave out the packing of experts for the CPU.
            method.moe_kernel = None
        _take_back_released_weight(module)


def _take_back_released_weight(module: Any) -> None:
    """MLA on AMX frees `kv_b_proj.weight` once it has packed it; the reload copies into it."""
    if not getattr(module, "_cpu_skip_gemm_dispatch", False):
        return
    loaded = get_layerwise_info(module).restore_metadata[0].get("weight")
    if loaded is not None and module.weight.numel() == 0:
        module.weight = torch.nn.Parameter(torch.empty(loaded.shape, dtype=loaded.dtype), requires_grad=False)


class Rebuild:
    """A module whose parameters are repacked: filled as they are loaded, then processed as vLLM does."""

    def __init__(self, module: Any, parameters: dict[str, Writes]) -> None:
        self._module = module
        self._fills = [
            (name, fill.target.view, fill.value) for name, w in parameters.items() for fill in w.fills
        ]
        #: Number of copies that make it complete.
        self.expected = 0
        self._taken = 0
        self._targets: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._open = False

    @property
    def begun(self) -> bool:
        """Whether some of it has been filled, and not all."""
        return self._open

    def take(self, name: str, view: View, source: torch.Tensor) -> bool:
        """Queue one copy into a view of a parameter. The last one completes the module; then True."""
        if not self._open:
            self._materialise()
        self._targets.append(view.of(getattr(self._module, name).data))
        self._sources.append(source)
        self._taken += 1
        if self._taken < self.expected:
            return False
        self._finish()
        return True

    def copy(self) -> None:
        """Carry out what is queued."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources, non_blocking=True)
        self._targets, self._sources = [], []

    def _materialise(self) -> None:
        module, info = self._module, get_layerwise_info(self._module)
        prepare_reload([module])
        info.kernel_tensors = get_layer_params_buffers(module)
        info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
        self._open = True
        restore_layer_on_meta(module, info)
        materialize_layer(module, info)
        for name, view, value in self._fills:
            view.of(getattr(module, name).data).fill_(value)

    def _finish(self) -> None:
        """Process it as vLLM's `_layerwise_process` does."""
        module, info = self._module, get_layerwise_info(self._module)
        self.copy()
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        module.quant_method.process_weights_after_loading(module)
        if hasattr(module, "update_param_tp_status"):
            module.update_param_tp_status()
        _copy_and_restore_kernel_tensors(module, info)
        info.reset()
        self._open, self._taken = False, 0

    def abandon(self) -> None:
        """Put the old tensors back, if an update broke off."""
        self._targets, self._sources, self._taken = [], [], 0
        if self._open:
            info = get_layerwise_info(self._module)
            _place_kernel_tensors(self._module, info)
            info.reset()
            self._open = False


def discard_packed(model: torch.nn.Module) -> None:
    """Free what CPU layers have packed for their products; the next push packs it anew."""
    for name, module in model.named_modules():
        # A layer may multiply with its weight as it is.
        if module.__dict__.get("cpu_linear", F.linear) is not F.linear:
            module.__dict__["cpu_linear"] = partial(_discarded, name)


def _discarded(name: str, *arguments: Any) -> torch.Tensor:
    raise RuntimeError(f"the weights of {name} were discarded; push a version first")


def refresh_packed(model: torch.nn.Module) -> None:
    """Rebuild what CPU embeddings and heads multiply with: a packed copy of a weight that stays beside it.

    vLLM's reload misses that of a tied `lm_head`, whose weight is loaded as that of the embedding.
    """
    if not current_platform.is_cpu():
        return
    sharing: dict[int, list[Any]] = {}
    for module in model.modules():
        packed = "cpu_linear" in module.__dict__ and module.weight.ndim == 2
        if packed and type(getattr(module, "quant_method", None)) is UnquantizedEmbeddingMethod:
            sharing.setdefault(id(module.weight), []).append(module)
    for modules in sharing.values():
        heads = [module for module in modules if isinstance(module, ParallelLMHead)]
        if heads:
            dispatch_cpu_unquantized_gemm(heads[0], remove_weight=False)
        for module in modules:
            module.cpu_linear = heads[0].cpu_linear if heads else _packed_when_used(module)


def _packed_when_used(module: Any) -> Callable[..., torch.Tensor]:
    """An embedding that only looks rows up never multiplies: half a second saved for a large vocabulary."""

    def linear(*arguments: Any) -> torch.Tensor:
        dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        output: torch.Tensor = module.cpu_linear(*arguments)
        return output

    return linear
