"""Experts one by one, as checkpoints name them; transformers' models have them stacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def unstacked(model: nn.Module, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its names in a checkpoint: a stack of experts as views of its matrices.

    Known are those of DeepSeek V3, Kimi K2 and Qwen 3: `gate_up_proj` [experts, 2 x width, hidden],
    gate above up, and `down_proj` [experts, hidden, width]. Shards of stacks, and all else, stay as they are.

    Args:
        model: that the parameter is of.
        name: of the parameter.
        weight: its value.
    """
    owner, _, leaf = name.rpartition(".")
    known = weight.ndim == 3 and leaf in ("gate_up_proj", "down_proj") and not isinstance(weight, DTensor)
    layout: Any = model.get_submodule(owner) if known else None
    if not known or getattr(layout, "is_transposed", False) or not getattr(layout, "is_concatenated", True):
        yield name, weight
        return
    for number, expert in enumerate(weight):
        if leaf == "down_proj":
            yield f"{owner}.{number}.down_proj.weight", expert
            continue
        gate, up = expert.chunk(2)
        yield f"{owner}.{number}.gate_proj.weight", gate
        yield f"{owner}.{number}.up_proj.weight", up
