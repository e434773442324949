"""A model spread over ranks by FSDP2: each holds rows of every parameter, in float32.

Layers are gathered one at a time, in the compute dtype, when they are computed, and let go again. Gradients
are added up over ranks in float32, each row on the rank that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from k2rl.checkpoint_engine.disk import CheckpointSource
from k2rl.models.factors import checkpoint_name, is_factor
from k2rl.training import tree_attention
from k2rl.training.group import DistributedGroup
from k2rl.training.loading import checked_config, layers_of, load_causal_lm, packed_logprobs
from k2rl.training.lora import Adapters


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of a DTensor's rows, or all of it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def holds_first_row(tensor: Tensor) -> bool:
    """Whether this process holds a tensor's first row: FSDP2 deals rows out in the order of ranks."""
    return not isinstance(tensor, DTensor) or tensor.device_mesh.get_local_rank() == 0


def load_sharded(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    group: DistributedGroup,
    adapters: Adapters | None = None,
) -> Any:
    """The model of a checkpoint with this rank's float32 rows of its parameters, to compute in `dtype`.

    Where the checkpoint has the model's own tensors, nothing but these rows is ever read. A model that
    transformers assembles from other tensors (stacked experts, say) is loaded whole first.

    Raises:
        ConfigError: as `load_causal_lm`.
    """
    with CheckpointSource(path, "float32") as stored:
        shapes = {spec.name: spec.shape for spec in stored.tensors}
        model = _empty_model(path)
        parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if parameters.items() <= shapes.items():
            if adapters is not None:
                adapters.add_to(model)
            shard(model, dtype, device, group)
            _read_rows(model, stored, device, adapters)
            for module in model.modules():
                module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})
        else:
            model = load_causal_lm(path, device, adapters)
            shard(model, dtype, device, group)
    return model.eval()


def _empty_model(path: Path) -> Any:
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            checked_config(path), dtype=torch.float32, attn_implementation=tree_attention.NAME
        )
    model.tie_weights()
    return model


def shard(model: Any, dtype: torch.dtype, device: torch.device, group: DistributedGroup) -> None:
    """Leave this rank's rows of a float32 model; embedding, last norm and head are gathered together."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model):
        fully_shard(layer, mesh=group.mesh, mp_policy=policy)
    fully_shard(model, mesh=group.mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums of ranks, not means: losses are shares of the whole batch's.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.packed_logprobs = MethodType(packed_logprobs, model)
    register_fsdp_forward_method(model, "packed_logprobs")


def _read_rows(
    model: nn.Module, stored: CheckpointSource, device: torch.device, adapters: Adapters | None
) -> None:
    index = {spec.name: number for number, spec in enumerate(stored.tensors)}
    names = {id(parameter): checkpoint_name(name) for name, parameter in model.named_parameters()}
    for held in fsdp_parameters(model):
        name = names[id(held.sharded_param)]
        first, rows = _rows_of(held.sharded_param)
        flat = torch.zeros(held.padded_sharded_param_size, dtype=torch.float32)
        if adapters is not None and is_factor(name):
            flat[:rows] = adapters.first(name, held.sharded_param.shape)[first : first + rows]
        elif rows:
            raw = flat[:rows].view(-1).view(torch.uint8).numpy().data
            stored.write(index[name], first, first + rows, raw)
        hold(held, flat.to(device).view(-1))


def _rows_of(parameter: DTensor) -> tuple[int, int]:
    """First row and number of rows that this rank holds."""
    chunk = -(-parameter.shape[0] // parameter.device_mesh.size())
    first = min(chunk * parameter.device_mesh.get_local_rank(), parameter.shape[0])
    return first, min(chunk, parameter.shape[0] - first)


def fsdp_parameters(model: nn.Module) -> Iterator[Any]:
    """FSDP2's own account of each parameter, tied ones once."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params


@torch.no_grad()
def hold(held: Any, flat: Tensor) -> None:
    """Let `flat`, [padded rows * row] float32, be where this rank's rows of a parameter lie.

    FSDP2 keeps them twice, as a DTensor and, padded to the same size on all ranks, as what it sends.
    """
    rows = flat.view(held.padded_sharded_param_size)[
        : held.sharded_size[0] if held.sharded_size.numel() else 0
    ]
    held._sharded_param_data = flat
    if held.sharded_param.is_meta:
        trained = held.sharded_param.requires_grad
        held.sharded_param = nn.Parameter(held.to_sharded_dtensor(rows), requires_grad=trained)
        held._setattr_on_modules(held.sharded_param)
    else:
        held.sharded_param._local_tensor = rows
