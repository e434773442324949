"""Weights straight from a checkpoint on disk, for engines that serve without a trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from k2rl.models.hub import weight_files


def checkpoint_weights(folder: Path, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a Hugging Face checkpoint, in the given floating dtype.

    Raises:
        ConfigError: a file of it is missing.
    """
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                tensor = tensors.get_tensor(name)
                yield name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
