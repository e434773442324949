"""The receiving end inside a vLLM worker: the model as a target of pushes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k2rl.checkpoint_engine.messages import RECEIVER, Peer, PushInvitation
from k2rl.checkpoint_engine.pieces import Piece, blocks_of, bytes_of, chunks
from k2rl.checkpoint_engine.placement import ModelLoader
from k2rl.checkpoint_engine.plan import Bucket, Needs, Plan, whole
from k2rl.checkpoint_engine.receiver import Receiver, Step

#: Bytes handed to the model's loader at once.
LOAD_BYTES = 4 << 20


class ModelTarget:
    """A live vLLM model as a receiver's target."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader

    def begin(self, plan: Plan) -> None:
        self._loader.begin()

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        pieces = blocks_of(plan, bucket, memory)
        return [(bytes_of(memory, chunk), self._placer(plan, chunk)) for chunk in chunks(pieces, LOAD_BYTES)]

    def _placer(self, plan: Plan, pieces: list[Piece]) -> Callable[[], None]:
        wholes, boxes = [], []
        for piece in pieces:
            spec = plan.tensors[piece.tensor]
            shape = [stop - start for start, stop in piece.box]
            tensor = piece.memory.view(getattr(torch, spec.dtype)).view(shape)
            if piece.box == whole(spec):
                wholes.append((spec.name, tensor))
            else:
                boxes.append((spec.name, piece.box, tensor))

        def place() -> None:
            if self._loader.needs is None and not plan.retains:
                # The first update's tensors are needed until its end; their place is not theirs so long.
                self._loader.load([(name, tensor.clone()) for name, tensor in wholes])
            elif wholes:
                self._loader.load(wholes)
            if boxes:
                self._loader.load_boxes(boxes)

        return place

    def finish(self) -> None:
        self._loader.finish()


class WeightReceiver:
    """A vLLM worker's part in pushes, from the first to the last."""

    def __init__(self, model: Any, model_config: Any, device: torch.device, rank: int) -> None:
        """
        Args:
            model: that is updated.
            model_config: vLLM's.
            device: of the model.
            rank: of this worker in its engine.
        """
        self._rank = rank
        self._loader = ModelLoader(model, model_config, device)
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
            self._receiver = Receiver(number, ModelTarget(self._loader), invitation.host)
        # Engines that come and go renumber the others.
        self._receiver.peer = Peer(RECEIVER, number)
        self._receiver.receive(invitation.address, invitation.deadline_s)
