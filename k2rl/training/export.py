"""A trained model as a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from k2rl.checkpoint_engine.manifest import FLOAT32_SUFFIX
from k2rl.models.factors import is_factor
from k2rl.training.checkpoint import replaced_folder
from k2rl.training.experts import unstacked
from k2rl.training.group import Group
from k2rl.training.loading import copy_companions
from k2rl.training.lora import ADAPTER_FOLDER, Adapters

FILE_BYTES = 5 * 10**9
"""Of a file with weights, at most (a larger tensor has its own): what rank 0 holds at once."""


def export(
    model: Any,
    named_weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    source: Path,
    folder: Path,
    group: Group,
    adapters: Adapters | None = None,
) -> None:
    """Write weights, configuration, tokenizer and chat template; `folder` is whole or not there.

    Ranks send their rows of one weight after the other, and rank 0 writes.

    Args:
        model: as it computes.
        named_weights: its weights as the model has them, or this rank's rows of them.
        dtype: that they are written in.
        source: folder of the checkpoint that the model is from.
        folder: to be written.
        group: of all ranks.
        adapters: those that are among the weights: merged into these, and saved by themselves.
    """
    with ExitStack() as undo:

        def begin() -> Path | None:
            return undo.enter_context(replaced_folder(folder)) if group.rank == 0 else None

        target = group.agreed(begin)
        if group.world == 1 and adapters is None:
            assert target is not None
            model.save_pretrained(target)
            copy_companions(source, target)
            return
        named = list(named_weights)
        factors = {name: _whole(name, weight, dtype) for name, weight in named if is_factor(name)}
        parts = list(_parts((pair for pair in named if pair[0] not in factors), dtype))
        index: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if parts[1:] else "model.safetensors"
            whole: dict[str, Tensor] = {}
            for weight, tensor in part:
                gathered = _whole(weight, tensor, dtype)
                if target:
                    done = gathered if adapters is None else adapters.merged(weight, gathered, factors)
                    whole |= unstacked(model, weight, done.cpu())
            index |= dict.fromkeys(whole, name)

            def write(name: str = name, whole: dict[str, Tensor] = whole) -> None:
                if target:
                    save_file(whole, target / name, metadata={"format": "pt"})

            group.agreed(write)

        def end() -> None:
            if target is None:
                return
            if parts[1:]:
                total = sum(tensor.numel() * dtype.itemsize for part in parts for _, tensor in part)
                about = {"metadata": {"total_size": total}, "weight_map": index}
                (target / "model.safetensors.index.json").write_text(json.dumps(about))
            model.config.save_pretrained(target)
            model.generation_config.save_pretrained(target)
            copy_companions(source, target)
            if adapters is not None:
                adapters.save(target / ADAPTER_FOLDER, factors)
            undo.close()

        group.agreed(end)


def _whole(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype that it is written in, gathered from all ranks."""
    cast = weight if name.endswith(FLOAT32_SUFFIX) else weight.to(dtype)
    return cast.full_tensor() if isinstance(cast, DTensor) else cast


def _parts(
    named_weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[list[tuple[str, Tensor]]]:
    """The weights of one file after the other."""
    part: list[tuple[str, Tensor]] = []
    room = FILE_BYTES
    for name, weight in named_weights:
        nbytes = weight.numel() * dtype.itemsize
        if part and nbytes > room:
            yield part
            part, room = [], FILE_BYTES
        part.append((name, weight))
        room -= nbytes
    yield part
