"""The receiving end inside a vLLM worker: a weight-transfer engine that takes part in pushes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from k2rl.checkpoint_engine.messages import Address
from k2rl.checkpoint_engine.pieces import Piece, blocks_of, bytes_of, chunks
from k2rl.checkpoint_engine.placement import ModelLoader
from k2rl.checkpoint_engine.plan import Bucket, Plan, whole
from k2rl.checkpoint_engine.receiver import Receiver, Step

BACKEND = "k2rl"

#: Bytes handed to the model's loader at once.
LOAD_BYTES = 4 << 20


@dataclass
class PushInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: each push brings its plan."""


@dataclass
class PushUpdateInfo(WeightTransferUpdateInfo):
    """Where a push's coordinator listens (an `Address` as builtin values), and who the engine is in it."""

    address: dict[str, Any]
    deadline_s: float
    #: Receiver number of the engine's tensor-parallel rank 0.
    first_receiver: int = 0
    host: int = 0


class ModelTarget:
    """A live vLLM model as a receiver's target."""

    def __init__(self, loader: ModelLoader) -> None:
        self._loader = loader

    def begin(self, plan: Plan) -> None:
        self._loader.begin()

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        pieces = blocks_of(bucket, memory)
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


class PushWeightTransferEngine(WeightTransferEngine[PushInitInfo, PushUpdateInfo]):
    """Takes part in one push for each `update_weights`: returns once the version is committed."""

    init_info_cls = PushInitInfo
    update_info_cls = PushUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._target = ModelTarget(ModelLoader(self.model, self.model_config, self.device))
        self._receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: PushInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """The push itself says when it begins."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it synchronises a CUDA device after each chunk.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        if self._receiver is None:
            number = update_info.first_receiver + self.parallel_config.rank
            self._receiver = Receiver(number, self._target, update_info.host)
        address = msgspec.convert(update_info.address, Address)
        self._receiver.receive(address, update_info.deadline_s)

    def finish_weight_update(self) -> None:
        """The version was committed in the push."""

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()


WeightTransferEngineFactory.register_engine(BACKEND, PushWeightTransferEngine)
