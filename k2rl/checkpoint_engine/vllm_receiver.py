"""The receiving end inside a vLLM worker: the model as a target of pushes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k2rl.checkpoint_engine.adapters import AdapterTarget
from k2rl.checkpoint_engine.manifest import TensorSpec
from k2rl.checkpoint_engine.messages import RECEIVER, DeltaRefusedError, Peer, PushInvitation
from k2rl.checkpoint_engine.pieces import Piece, blocks_of, bytes_of, chunks
from k2rl.checkpoint_engine.placement import ModelLoader
from k2rl.checkpoint_engine.plan import Box, Bucket, Needs, Plan, whole
from k2rl.checkpoint_engine.receiver import Receiver, Step, Target

#: Bytes handed to the model's loader at once.
LOAD_BYTES = 4 << 20


class ModelTarget:
    """A live vLLM model as a receiver's target."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader
        #: What a first update has brought in boxes so far, with what is missing yet.
        self._assembled: dict[str, tuple[Tensor, Tensor]] = {}
        self._learned: set[str] = set()

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        return self._loader.together

    def begin(self, plan: Plan) -> None:
        if plan.base is not None:
            self._check_delta(plan)
        self._assembled, self._learned = {}, set()
        self._loader.begin(partial=plan.base is not None)

    def _check_delta(self, plan: Plan) -> None:
        """Before anything is changed: whether what must come whole and together does."""
        if self._loader.needs is None:
            raise DeltaRefusedError("the first update of an engine takes whole tensors")
        blocks = [block for bucket in plan.buckets for block in bucket.blocks]
        sent = {plan.tensors[block.tensor].name for block in blocks}
        wholes = {
            plan.tensors[block.tensor].name
            for block in blocks
            if block.box == whole(plan.tensors[block.tensor])
        }
        for names in self._loader.together:
            if not sent.isdisjoint(names) and (missing := set(names) - wholes):
                raise DeltaRefusedError(
                    f"{min(missing)} is needed whole if any of {', '.join(names)} changes"
                )

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        pieces = blocks_of(bucket, memory)
        return [
            (bytes_of(memory, bucket, chunk, plan.cell_bytes), self._placer(plan, chunk))
            for chunk in chunks(pieces, LOAD_BYTES)
        ]

    def _placer(self, plan: Plan, pieces: list[Piece]) -> Callable[[], None]:
        wholes, boxes = [], []
        for piece in pieces:
            spec = plan.tensors[piece.tensor]
            shape = [stop - start for start, stop in piece.box]
            tensor = piece.memory.view(getattr(torch, spec.dtype)).view(shape)
            if piece.box == whole(spec):
                wholes.append((spec.name, tensor))
            else:
                boxes.append((spec, piece.box, tensor))

        def place() -> None:
            if self._loader.needs is None:
                # The first update's tensors are needed until its end; their place may not be theirs so long.
                for name, tensor in wholes:
                    self._learn(name, tensor if plan.retains else tensor.clone())
                for spec, box, tensor in boxes:
                    self._assemble(spec, box, tensor)
                return
            if wholes:
                self._loader.load(wholes)
            if boxes:
                self._loader.load_boxes((spec.name, box, tensor) for spec, box, tensor in boxes)

        return place

    def _assemble(self, spec: TensorSpec, box: Box, tensor: Tensor) -> None:
        """A first update takes whole tensors; a version that was pushed to others came in their boxes."""
        if spec.name not in self._assembled:
            fresh = torch.empty(spec.shape, dtype=tensor.dtype)
            self._assembled[spec.name] = fresh, torch.ones(spec.shape, dtype=torch.bool)
        all_of_it, missing = self._assembled[spec.name]
        cut = tuple(slice(*ends) for ends in box)
        all_of_it[cut] = tensor
        missing[cut] = False
        if not missing.any():
            self._learn(spec.name, all_of_it)

    def _learn(self, name: str, tensor: Tensor) -> None:
        """Once, although some may need it whole and others a part of it."""
        if name not in self._learned:
            self._learned.add(name)
            self._loader.load([(name, tensor)])

    def finish(self) -> None:
        self._loader.finish()
        self._assembled = {}


class WeightReceiver:
    """A vLLM worker's part in pushes, from the first to the last."""

    def __init__(
        self, model: Any, model_config: Any, device: torch.device, rank: int, adapter_scale: float | None
    ) -> None:
        """
        Args:
            model: that is updated.
            model_config: vLLM's.
            device: of the model.
            rank: of this worker in its engine.
            adapter_scale: where pushes bring adapters: what their products are multiplied by.
        """
        self._rank = rank
        self._loader = ModelLoader(model, model_config, device)
        self._target: Target = ModelTarget(self._loader)
        if adapter_scale is not None:
            self._target = AdapterTarget(self._target, self._loader, adapter_scale, device)
        self._receiver: Receiver | None = None

    @property
    def needs(self) -> Needs | None:
        """Boxes of the tensors that this worker reads, by name; None before the first complete push."""
        return self._loader.needs

    def take_part(self, invitation: PushInvitation) -> None:
        """Receive a version; returns once it is committed.

        Raises:
            TransferError: the push failed.
        """
        number = invitation.first_receiver + self._rank
        if self._receiver is None:
            self._receiver = Receiver(number, self._target, invitation.host)
        # Engines that come and go renumber the others.
        self._receiver.peer = Peer(RECEIVER, number)
        self._receiver.receive(invitation.address, invitation.deadline_s)

    def unload(self) -> None:
        """Between pushes: hold none of the arena's memory."""
        if self._receiver is not None:
            self._receiver.unload()

    def forget(self) -> None:
        """The model's weights are gone: no delta can build on them."""
        if self._receiver is not None:
            self._receiver.version = None
