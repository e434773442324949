"""A live vLLM model that takes adapters: pushes bring their factors, and the products go into its weights.

The model is then one without adapters: whatever layer is loaded can have one, with any kernel and any number
of tensor-parallel ranks, and sampling costs what it did. For that the receiver keeps what it was sent of the
weights that have adapters, without these, in the host's memory: the boxes of them that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from k2rl.checkpoint_engine.messages import DeltaRefusedError, TransferError
from k2rl.checkpoint_engine.pieces import Piece, blocks_of, bytes_of
from k2rl.checkpoint_engine.placement import ModelLoader
from k2rl.checkpoint_engine.plan import Block, Box, Bucket, Plan, whole
from k2rl.checkpoint_engine.receiver import Step, Target
from k2rl.models.factors import adapted_weight, factors_of, is_factor
from k2rl.models.merging import merged


class _Kept(NamedTuple):
    """A tensor without its adapter: the boxes of it that this worker reads."""

    shape: torch.Size
    boxes: list[tuple[Box, Tensor]]


class AdapterTarget:
    """A model and its adapters as a receiver's target.

    A push of everything brings weights and factors. A delta brings factors: they are staged, and the model is
    not touched before all have arrived.
    """

    def __init__(self, model: Target, loader: ModelLoader, scale: float, device: torch.device) -> None:
        """
        Args:
            model: takes the weights.
            loader: of that model.
            scale: of the adapters' products.
            device: of the model.
        """
        self._model = model
        self._loader = loader
        self._scale = scale
        self._device = device
        self._factors: dict[str, Tensor] = {}
        #: What a push of everything has brought of the weights.
        self._wholes: dict[str, Tensor] = {}
        self._kept: dict[str, _Kept] = {}
        #: Tensors that are loaded together if the adapter of one of them changes.
        self._groups: list[tuple[str, ...]] = []
        self._delta = False

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        return (*self._model.together, tuple(sorted(self._factors)))

    def begin(self, plan: Plan) -> None:
        self._delta = plan.base is not None
        if not self._delta:
            self._factors, self._wholes = {}, {}
            self._model.begin(plan)
            return
        sent = {plan.tensors[block.tensor].name for bucket in plan.buckets for block in bucket.blocks}
        if sent and sent != self._factors.keys():
            other = min(sent ^ self._factors.keys())
            raise DeltaRefusedError(f"a delta brings all factors of adapters and nothing else, not {other}")

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        def is_factors(block: Block) -> bool:
            return is_factor(plan.tensors[block.tensor].name)

        steps: list[Step] = []
        for factors, blocks in groupby(bucket.blocks, is_factors):  # bytes are hashed in their order
            part = msgspec.structs.replace(bucket, blocks=tuple(blocks))
            pieces = list(blocks_of(part, memory))
            if factors:
                steps.append((bytes_of(memory, part, pieces, plan.cell_bytes), self._stage(plan, pieces)))
            else:
                steps += self._model.steps(plan, part, memory)
                steps.append(([], self._note(plan, pieces)))
        return steps

    def _stage(self, plan: Plan, pieces: list[Piece]) -> Callable[[], None]:
        found = [_named(plan, piece) for piece in pieces]

        def place() -> None:
            self._factors.update((name, tensor.clone()) for name, tensor in found)

        return place

    def _note(self, plan: Plan, pieces: list[Piece]) -> Callable[[], None]:
        """Remember weights until the push ends, when it is known what of them is read."""
        found = [_named(plan, piece) for piece in pieces]

        def note() -> None:
            for name, tensor in found:
                if name in self._kept or not self._kept:
                    self._wholes[name] = tensor if plan.retains else tensor.clone()

        return note

    def finish(self) -> None:
        if not self._delta:
            self._model.finish()
            self._keep()
        self._loader.begin(partial=True)
        for names in self._groups:
            self._loader.load((name, self._with_adapter(name)) for name in names)
        self._loader.finish()

    def _keep(self) -> None:
        targets = {adapted_weight(name) for name in self._factors}
        self._groups = [names for names in self._loader.together if not targets.isdisjoint(names)]
        grouped = {name for names in self._groups for name in names}
        self._groups += [(name,) for name in sorted(targets - grouped)]
        needs = self._loader.needs or {}
        self._kept = {}
        for name in grouped | targets:
            tensor = self._wholes[name]
            boxes = [(box, tensor[_cut(box)].clone()) for box in needs.get(name, ())]
            self._kept[name] = _Kept(tensor.shape, boxes)
        self._wholes = {}

    def _with_adapter(self, name: str) -> Tensor:
        """A whole tensor, of which that is filled in which this worker reads."""
        kept, (a, b) = self._kept[name], map(self._factors.get, factors_of(name))
        dtype = next((tensor.dtype for _, tensor in kept.boxes), torch.float32)
        filled = torch.empty(kept.shape, dtype=dtype, device=self._device)
        for box, tensor in kept.boxes:
            part = tensor.to(self._device)
            if a is not None and b is not None:
                rows, columns = _cut(box)
                part = merged(part, a[:, columns].to(self._device), b[rows].to(self._device), self._scale)
            filled[_cut(box)] = part
        return filled


def _named(plan: Plan, piece: Piece) -> tuple[str, Tensor]:
    """A whole tensor of a push, where it lies."""
    spec = plan.tensors[piece.tensor]
    if piece.box != whole(spec):
        raise TransferError(f"{spec.name} is needed whole, where there are adapters")
    return spec.name, piece.memory.view(getattr(torch, spec.dtype)).view(spec.shape)


def _cut(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in box)
