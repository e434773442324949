"""Which parameters Muon updates, and which matrices they hold.

Muon orthogonalises linear maps. A parameter that stores several of them as one tensor (queries, keys and
values; gate and up; all experts of a layer) is as many matrices: orthogonalised as one, they would share
one set of singular values (Moonlight, arXiv 2502.16982, section 2.2, orthogonalises each on its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from k2rl.models.factors import is_factor


@dataclass(frozen=True)
class Box:
    """A matrix inside a parameter seen as [experts, rows, columns]; one of two dimensions has one expert."""

    expert: int
    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)


def is_muon_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix or a stack of experts, and neither embedding nor output head.

    Moonlight, section 2.2. Nor a factor of an adapter: the map is the product of two, and to orthogonalise
    each says nothing about it. Other tensors of three dimensions (convolutions) are no matrices.
    """
    if (
        name.endswith("bias")
        or is_factor(name)
        or any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
    ):
        return False
    return parameter.ndim == 2 or (parameter.ndim == 3 and ".experts." in f".{name}")


def boxes_of(name: str, shape: tuple[int, ...], model: nn.Module | None = None) -> tuple[Box, ...]:
    """The matrices that a parameter of Muon's holds.

    Args:
        name: its name in `model`. `qkv_proj` and `gate_up_proj` are what transformers calls fused ones.
        shape: [rows, columns] or [experts, rows, columns].
        model: tells how many queries share a key, and how experts are laid out. Without it `qkv_proj`
            is one matrix, and experts are [experts, out, in], gate before up.
    """
    experts, rows, columns = (1, *shape) if len(shape) == 2 else shape
    along_rows: tuple[range, ...] = (range(rows),)
    along_columns: tuple[range, ...] = (range(columns),)
    owner, _, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf == "qkv_proj":
        along_rows = _in_shares(rows, _qkv_shares(owner, model))
    elif leaf == "gate_up_proj":
        layout = _module(model, owner) if len(shape) == 3 else None
        transposed = getattr(layout, "is_transposed", False)
        size = columns if transposed else rows
        concatenated = getattr(layout, "is_concatenated", True)
        parts = _in_shares(size, (1, 1)) if concatenated else (range(0, size, 2), range(1, size, 2))
        along_rows, along_columns = (along_rows, parts) if transposed else (parts, along_columns)
    return tuple(
        Box(expert, part, width)
        for expert in range(experts)
        for part in along_rows
        for width in along_columns
    )


def _qkv_shares(owner: str, model: nn.Module | None) -> tuple[int, ...]:
    """Relative heights of queries, keys and values; one share if the attention does not tell."""
    queries_per_key = getattr(_module(model, owner), "num_key_value_groups", None)
    return (1,) if queries_per_key is None else (queries_per_key, 1, 1)


def _in_shares(size: int, shares: tuple[int, ...]) -> tuple[range, ...]:
    unit, rest = divmod(size, sum(shares))
    if rest:
        raise ValueError(f"{size} rows do not divide into shares of {shares}")
    ranges, start = [], 0
    for share in shares:
        ranges.append(range(start, start + share * unit))
        start += share * unit
    return tuple(ranges)


def _module(model: nn.Module | None, name: str) -> Any:
    return None if model is None else model.get_submodule(name)
