"""Experts one by one, as checkpoints name them; transformers' models have them stacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from k2rl.checkpoint_engine.sender import local_rows


def unstacked(model: nn.Module, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter under its names in a checkpoint: a stack of experts as views of its matrices.

    Known are those of DeepSeek V3, Kimi K2 and Qwen 3: `gate_up_proj` [experts, 2 x width, hidden],
    gate above up, and `down_proj` [experts, hidden, width]. All else stays as it is.

    Args:
        model: that the parameter is of.
        name: of the parameter.
        weight: its value. Of a stack that is sharded over ranks, whose rows are experts, there come those
            that this rank holds.

    Raises:
        ValueError: a stack is sharded along another dimension than its first.
    """
    owner, _, leaf = name.rpartition(".")
    known = weight.ndim == 3 and leaf in ("gate_up_proj", "down_proj")
    layout: Any = model.get_submodule(owner) if known else None
    if not known or getattr(layout, "is_transposed", False) or not getattr(layout, "is_concatenated", True):
        yield name, weight
        return
    experts, first = local_rows(name, weight)
    for number, expert in enumerate(experts, start=first):
        if leaf == "down_proj":
            yield f"{owner}.{number}.down_proj.weight", expert
            continue
        gate, up = expert.chunk(2)
        yield f"{owner}.{number}.gate_proj.weight", gate
        yield f"{owner}.{number}.up_proj.weight", up
