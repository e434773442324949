"""A trainer rank's side of a push: it copies its rows of the weights into the arena, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from k2rl.checkpoint_engine.arena import ArenaCache
from k2rl.checkpoint_engine.copying import copies
from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec
from k2rl.checkpoint_engine.messages import (
    SENDER,
    Address,
    Begin,
    Channel,
    Commit,
    Filled,
    Free,
    Peer,
    TransferError,
)
from k2rl.checkpoint_engine.pieces import Piece, Remembered, bytes_of, chunks, pieces_of
from k2rl.checkpoint_engine.plan import NO_PLAN, Bucket, Plan


class Source(Protocol):
    """Where a rank's weights come from."""

    @property
    def manifest(self) -> Manifest:
        """What this rank holds."""
        ...

    def copier(self, plan: Plan, pieces: Sequence[Piece]) -> Callable[[], None]:
        """A function that copies these pieces; it is kept and called at every push with the same plan."""
        ...

    @property
    def identity(self) -> object:
        """Changes when functions made by `copier` are no longer right."""
        ...


class TensorSource:
    """Tensors of the trainer: plain ones are held whole, DTensors (FSDP2) by rows."""

    def __init__(
        self, named_tensors: Iterable[tuple[str, Tensor]], rank: int, dtype: str | None = None
    ) -> None:
        """
        Args:
            named_tensors: by the names of the checkpoint; sharded along dimension 0 or not at all.
            rank: of this trainer.
            dtype: that floating tensors are sent in (torch's name); default: their own.

        Raises:
            ValueError: a tensor is sharded along another dimension, or holds partial sums.
        """
        specs: list[TensorSpec] = []
        shards: list[Shard] = []
        self._local: dict[str, tuple[Tensor, int]] = {}
        for name, tensor in named_tensors:
            kind = str(tensor.dtype).removeprefix("torch.")
            if dtype is not None and tensor.is_floating_point():
                kind = dtype
            spec = TensorSpec(name, kind, tuple(tensor.shape))
            local, first = _local_rows(name, tensor.detach())
            rows = local.shape[0] if local.ndim else 1
            if rows:
                shards.append(Shard(len(specs), rank, first, first + rows))
            specs.append(spec)
            self._local[name] = (local, first)
        self.manifest = Manifest(tuple(specs), tuple(shards))

    @property
    def identity(self) -> object:
        return tuple(
            (name, local.data_ptr(), local.dtype, local.shape, local.stride())
            for name, (local, _) in self._local.items()
        )

    def copier(self, plan: Plan, pieces: Sequence[Piece]) -> Callable[[], None]:
        sources, targets = [], []
        for piece in pieces:
            spec = plan.tensors[piece.tensor]
            source, first = self._local[spec.name]
            for dimension, (start, stop) in enumerate(piece.box):
                skip = first if dimension == 0 else 0
                source = source.narrow(dimension, start - skip, stop - start)
            sources.append(source)
            targets.append(piece.memory.view(getattr(torch, spec.dtype)).view(source.shape))
        return copies(targets, sources)


def _local_rows(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and the number of its first row."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{name} holds partial sums, not values: {tensor.placements}")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise ValueError(f"{name} is sharded along another dimension than its first: {tensor.placements}")
    return tensor.to_local(), offset[0] if offset else 0


class Sender:
    """A trainer rank; keeps its mapping and its copying plan from push to push."""

    def __init__(self, rank: int, host: int = 0) -> None:
        self._peer = Peer(SENDER, rank)
        self._host = host
        self._plan = NO_PLAN
        self._compiled: Remembered[list[tuple[Bucket, list[Step]]]] = Remembered()
        self._arena = ArenaCache(writable=True, replaced=self._compiled.clear)

    def send(self, source: Source, address: Address, deadline_s: float) -> int:
        """Take part in the push that the coordinator at `address` is about to make.

        Args:
            source: this rank's weights; they must not change until this returns.
            address: the coordinator's.
            deadline_s: longest silence of the coordinator.

        Returns:
            The version that was committed.

        Raises:
            TransferError: the push failed.
        """
        with Channel(address, self._peer, deadline_s, self._host, self._plan.digest) as channel:
            begin = channel.expect(Begin)
            self._plan = begin.plan or self._plan
            self._fill(source, begin, channel)
            while not isinstance(message := channel.receive(), Commit):
                if not isinstance(message, Free):
                    raise TransferError(f"expected Commit, got {message}")
            return begin.version

    def _fill(self, source: Source, begin: Begin, channel: Channel) -> None:
        plan = self._plan
        arena = self._arena.open(begin.arenas, begin.arena_name)
        memory = arena.memory[begin.base : begin.base + plan.arena_bytes]
        key = (plan.digest, begin.base, arena.name, source.identity)
        compiled = self._compiled.get(key, lambda: _compile(plan, self._peer.rank, source, memory))
        freed: set[int] = set()
        for bucket, steps in compiled:
            while bucket.after >= 0 and bucket.after not in freed:
                freed.add(channel.expect(Free).bucket)
            digest = xxhash.xxh3_128()
            for copy, written in steps:
                copy()
                for _, view in written:
                    digest.update(view)
            channel.send(Filled(bucket.index, digest.hexdigest()))

    def close(self) -> None:
        self._arena.close()


#: A copy, and the bytes of the arena that it has written.
Step = tuple[Callable[[], None], list[tuple[int, memoryview]]]


def _compile(plan: Plan, rank: int, source: Source, memory: Tensor) -> list[tuple[Bucket, list[Step]]]:
    """What this rank does for each bucket that it writes into."""
    return [
        (
            bucket,
            [
                (source.copier(plan, chunk), bytes_of(memory, chunk))
                for chunk in chunks(pieces_of(bucket, memory, rank))
            ],
        )
        for bucket in plan.buckets
        if rank in bucket.owners
    ]
