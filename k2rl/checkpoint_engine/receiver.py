"""An inference worker's side of a push: it checks what lies in the arena, places it, and votes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from k2rl.checkpoint_engine.arena import Arena, ArenaCache
from k2rl.checkpoint_engine.cells import Cell, CellHashes
from k2rl.checkpoint_engine.copying import copies
from k2rl.checkpoint_engine.messages import (
    RECEIVER,
    Address,
    Applied,
    Begin,
    Channel,
    Commit,
    Committed,
    Deliver,
    DeltaRefusedError,
    Finish,
    Finished,
    Peer,
    TransferError,
)
from k2rl.checkpoint_engine.pieces import Piece, Remembered, bytes_of, chunks, pieces_of
from k2rl.checkpoint_engine.plan import NO_PLAN, Bucket, Plan
from k2rl.checkpoint_engine.transaction import version_digest

#: Bytes to hash, by cells, and what places them.
Step = tuple[list[tuple[Cell, memoryview]], Callable[[], None]]


class Target(Protocol):
    """Where a receiver puts weights."""

    @property
    def together(self) -> tuple[tuple[str, ...], ...]:
        """Sets of tensors that deltas must bring whole and together or not at all."""
        ...

    def begin(self, plan: Plan) -> None:
        """An update starts; whatever an earlier one left undone is void.

        Raises:
            TransferError: it cannot take these tensors; nothing was changed.
        """
        ...

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        """How to place a bucket; kept and followed at every push of this plan, unless it is a delta.

        Args:
            plan: of the push.
            bucket: to place.
            memory: uint8, the plan's places; it stays valid until the push ends if the plan retains, else
                until the bucket is placed.
        """
        ...

    def finish(self) -> None:
        """Everything is in place: do what comes after loading.

        Raises:
            TransferError: something was not updated.
        """
        ...


class TensorTarget:
    """Plain tensors in memory, by name."""

    together: tuple[tuple[str, ...], ...] = ()

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._updated: set[str] = set()

    def begin(self, plan: Plan) -> None:
        self._updated = set() if plan.base is None else set(self._tensors)
        for spec in plan.tensors:
            target = self._tensors.get(spec.name)
            if target is not None and tuple(target.shape) != spec.shape:
                raise TransferError(
                    f"{spec.name} has {list(target.shape)} here, and {list(spec.shape)} there"
                )

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        return [self._step(plan, bucket, memory, chunk) for chunk in chunks(pieces_of(bucket, memory))]

    def _step(self, plan: Plan, bucket: Bucket, memory: Tensor, pieces: Sequence[Piece]) -> Step:
        sources, targets = [], []
        for piece in pieces:
            spec = plan.tensors[piece.tensor]
            target = self._tensors[spec.name]
            for dimension, (start, stop) in enumerate(piece.box):
                target = target.narrow(dimension, start, stop - start)
            targets.append(target)
            sources.append(piece.memory.view(getattr(torch, spec.dtype)).view(target.shape))
        names = {plan.tensors[piece.tensor].name for piece in pieces}
        copy = copies(targets, sources)

        def place() -> None:
            copy()
            self._updated.update(names)

        return bytes_of(memory, bucket, pieces, plan.cell_bytes), place

    def finish(self) -> None:
        missing = sorted(self._tensors.keys() - self._updated)
        if missing:
            raise TransferError(f"{len(missing)} tensors were not updated, such as {missing[0]}")


class Receiver:
    """An inference worker; keeps its mapping and its placing plan from push to push."""

    def __init__(self, rank: int, target: Target, host: int = 0) -> None:
        #: Who it is in a push.
        self.peer = Peer(RECEIVER, rank)
        self._target = target
        self._host = host
        self._plan = NO_PLAN
        self._compiled: Remembered[dict[int, list[Step]]] = Remembered()
        self._arena = ArenaCache(writable=False, replaced=self._compiled.clear)
        #: The version in place; None while none is, or only parts of one.
        self.version: int | None = None
        self._newest = -1

    def receive(self, address: Address, deadline_s: float) -> int:
        """Take part in the push that the coordinator at `address` is making.

        Returns:
            The version that was committed.

        Raises:
            TransferError: the push failed. `version` is None if anything was changed.
        """
        with Channel(address, self.peer, deadline_s, self._host, self._plan.digest) as channel:
            begin = channel.expect(Begin)
            plan = begin.plan or self._plan
            if plan.base is None:
                self._plan = plan
            elif plan.base != self.version:
                held = "no whole version" if self.version is None else f"version {self.version}"
                raise DeltaRefusedError(f"it holds {held}, and the delta builds on version {plan.base}")
            # A whole push of the version that it has is for others of its engine, which have lost it.
            if begin.version < self._newest or begin.version == plan.base:
                raise TransferError(
                    f"version {begin.version} is not newer than {self._newest}, which is in place"
                )
            arena = self._arena.open(begin.arenas, begin.arena_name)
            self._target.begin(plan)
            self.version = None
            self._apply(plan, begin, arena, channel)
            self._target.finish()
            together = self._target.together if plan.base is None else ()
            channel.send(Finished(self._digest(plan), arena.path, together))
            channel.expect(Commit)
            self.version = self._newest = begin.version
            # The version stands; a coordinator that is gone need not know that we have it.
            with suppress(TransferError):
                channel.send(Committed())
            return begin.version

    def _apply(self, plan: Plan, begin: Begin, arena: Arena, channel: Channel) -> None:
        compiled: dict[int, list[Step]] = {}
        if plan.base is None:  # no two deltas are alike
            compiled = self._compiled.get((plan.digest, begin.base, arena.name), dict)
        memory = arena.memory[begin.base : begin.base + plan.arena_bytes]
        self._applied: dict[int, Mapping[int, str]] = {}
        while isinstance(message := channel.receive(), Deliver):
            bucket = plan.buckets[message.bucket]
            steps = compiled.get(bucket.index)
            if steps is None:
                steps = compiled[bucket.index] = self._target.steps(plan, bucket, memory)
            digests = self._place(steps, plan.cell_bytes)
            if digests != message.digests:
                owner = next(o for o, digest in digests.items() if message.digests.get(o) != digest)
                raise TransferError(
                    f"bucket {bucket.index} arrived corrupted: not the bytes that trainer rank {owner} sent"
                )
            self._applied[bucket.index] = digests
            channel.send(Applied(bucket.index, digests))
        if not isinstance(message, Finish):
            raise TransferError(f"expected Finish, got {message}")

    @staticmethod
    def _place(steps: Iterable[Step], cell_bytes: int) -> dict[int, str]:
        """Hash, then place while the bytes are in the cache still; the digest of each owner's parts."""
        hashes = CellHashes(cell_bytes)
        for views, place in steps:
            hashes.update(views)
            place()
        return hashes.of_owners()

    def _digest(self, plan: Plan) -> str:
        return version_digest(
            self._applied[bucket.index] for bucket in plan.buckets if bucket.index in self._applied
        )

    def unload(self) -> None:
        """Between pushes: hold none of the arena's memory."""
        self._arena.unload()

    def close(self) -> None:
        self._arena.close()
