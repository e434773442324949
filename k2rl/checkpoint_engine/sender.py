"""A trainer rank's side of a push: it copies its rows of the weights into the arena, bucket by bucket.

It remembers digests of what it has pushed, and so finds out which rows have changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from k2rl.checkpoint_engine.arena import ArenaCache
from k2rl.checkpoint_engine.cells import Cell, CellHashes, digest_of, rows_in
from k2rl.checkpoint_engine.copying import copies
from k2rl.checkpoint_engine.manifest import FLOAT32_SUFFIX, Manifest, Shard, TensorSpec
from k2rl.checkpoint_engine.messages import (
    SENDER,
    Address,
    Begin,
    Channel,
    Commit,
    DeltaRefusedError,
    Filled,
    Free,
    Peer,
    TransferError,
)
from k2rl.checkpoint_engine.pieces import (
    Piece,
    Remembered,
    bytes_of,
    chunks,
    pieces_of,
    rehoused,
    room_for,
)
from k2rl.checkpoint_engine.plan import NO_PLAN, Bucket, Plan


class Source(Protocol):
    """Where a rank's weights come from."""

    @property
    def manifest(self) -> Manifest:
        """What this rank holds."""
        ...

    def copier(self, plan: Plan, pieces: Sequence[Piece]) -> Callable[[], None]:
        """A function that copies these pieces into their memory.

        It is kept, and called at every push with the same plan.
        """
        ...

    @property
    def identity(self) -> object:
        """Changes when functions made by `copier` are no longer right."""
        ...

    @property
    def frozen(self) -> Collection[str]:
        """Tensors that never change: no delta looks at them."""
        ...


class TensorSource:
    """Tensors of the trainer: plain ones are held whole, DTensors (FSDP2) by rows."""

    frozen: Collection[str] = ()

    def __init__(
        self,
        named_tensors: Iterable[tuple[str, Tensor]],
        rank: int,
        dtype: str | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        """
        Args:
            named_tensors: by the names of the checkpoint; sharded along dimension 0 or not at all.
            rank: of this trainer.
            dtype: that floating tensors are sent in (torch's name); default: their own.
            frozen: names of those that never change.

        Raises:
            ValueError: a tensor is sharded along another dimension, or holds partial sums.
        """
        specs: list[TensorSpec] = []
        shards: list[Shard] = []
        self._local: dict[str, tuple[Tensor, int]] = {}
        self.frozen = frozenset(frozen)
        for name, tensor in named_tensors:
            kind = str(tensor.dtype).removeprefix("torch.")
            if dtype is not None and tensor.is_floating_point() and not name.endswith(FLOAT32_SUFFIX):
                kind = dtype
            spec = TensorSpec(name, kind, tuple(tensor.shape))
            local, first = local_rows(name, tensor.detach())
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


def local_rows(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and the number of its first row.

    Raises:
        ValueError: it is sharded along another dimension than its first, or holds partial sums.
    """
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
        self._scans: Remembered[list[tuple[Bucket, list[Step]]]] = Remembered()
        #: By version. A push may fail: then the one before is what receivers hold.
        self._held: dict[int, _Held] = {}

    def changes(
        self, source: Source, plan: Plan, base: int, version: int
    ) -> dict[str, list[tuple[int, int]]]:
        """Read this rank's weights, and find what differs from what was pushed as version `base`.

        Buckets of frozen tensors alone are not read.

        Args:
            source: this rank's weights; they must not change until the push of them has ended.
            plan: for a push of everything.
            base: the version to compare with; if it was not pushed from here with this plan, all has changed.
            version: under which these weights will be pushed.

        Returns:
            By tensor name, ranges of rows: those in the cells (`Plan.cell_bytes`) of a bucket that are not as
            they were.

        Raises:
            ValueError: the version is not newer.
        """
        if version <= base:
            raise ValueError(f"version {version} is not newer than {base}, which is committed")
        key = (plan.digest, source.identity)
        cells: list[dict[int, bytes]] = [{} for _ in plan.buckets]
        held = self._held.get(base)
        known = held is not None and held.plan.digest == plan.digest
        before = held.cells if held is not None and known else [{} for _ in plan.buckets]
        frozen = {number for number, spec in enumerate(plan.tensors) if known and spec.name in source.frozen}
        for bucket, steps in self._scans.get(key, lambda: _scan(plan, self._peer.rank, source)):
            if all(block.tensor in frozen for block in bucket.blocks):
                cells[bucket.index] = before[bucket.index]
            else:
                _, cells[bucket.index] = _fill(steps, plan.cell_bytes)
        self._hold(version, _Held(plan, cells))
        changed: dict[str, list[tuple[int, int]]] = {}
        for bucket, now, then in zip(plan.buckets, cells, before, strict=True):
            different = [number for number, digest in now.items() if then.get(number) != digest]
            if not different:
                continue
            for tensor, start, stop in rows_in(bucket, self._peer.rank, different, plan.cell_bytes):
                if tensor in frozen:  # it shares a cell with what has changed
                    continue
                changed.setdefault(plan.tensors[tensor].name, []).append((start, stop))
        return changed

    def _hold(self, version: int, held: _Held) -> None:
        self._held.pop(version, None)
        self._held[version] = held
        if len(self._held) > 2:
            del self._held[next(iter(self._held))]

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
            plan = begin.plan or self._plan
            if plan.base is None:
                self._plan = plan
            self._fill(source, plan, begin, channel)
            while not isinstance(message := channel.receive(), Commit):
                if not isinstance(message, Free):
                    raise TransferError(f"expected Commit, got {message}")
            return begin.version

    def _fill(self, source: Source, plan: Plan, begin: Begin, channel: Channel) -> None:
        arena = self._arena.open(begin.arenas, begin.arena_name)
        memory = arena.memory[begin.base : begin.base + plan.arena_bytes]
        rank, held, wholes = self._peer.rank, self._held.get(begin.version), {}
        cells: list[dict[int, bytes]] = [{} for _ in plan.buckets]
        if plan.base is None:
            key = (plan.digest, begin.base, arena.name, source.identity)
            compiled = self._compiled.get(key, lambda: _compile(plan, rank, source, memory))
            self._hold(begin.version, _Held(plan, cells))
        else:  # no two deltas are alike
            compiled = _compile(plan, rank, source, memory)
            if held is None:
                raise DeltaRefusedError(f"what changed in version {begin.version} was not looked for here")
            if plan.retains:
                wholes = {bucket.offset: held.cells[bucket.index] for bucket in held.plan.buckets}
        freed: set[int] = set()
        for bucket, steps in compiled:
            while bucket.after >= 0 and bucket.after not in freed:
                freed.add(channel.expect(Free).bucket)
            digest, cells[bucket.index] = _fill(steps, plan.cell_bytes)
            whole = digest_of(wholes[bucket.offset]) if bucket.offset in wholes else ""
            channel.send(Filled(bucket.index, digest, whole))

    def unload(self) -> None:
        """Between pushes: hold none of the arena's memory."""
        self._arena.unload()

    def close(self) -> None:
        self._scans.clear()
        self._arena.close()


class _Held(NamedTuple):
    """A version as it was pushed: the plan for all of it, and by bucket the digests of this rank's cells."""

    plan: Plan
    cells: list[dict[int, bytes]]


#: A copy, and the bytes that it has written, by cells.
Step = tuple[Callable[[], None], list[tuple[Cell, memoryview]]]


def _fill(steps: list[Step], cell_bytes: int) -> tuple[str, dict[int, bytes]]:
    """Copy and hash; one owner's digest of the bucket, and of its cells."""
    hashes = CellHashes(cell_bytes)
    for copy, written in steps:
        copy()
        hashes.update(written)
    cells = {number: digest for (_, number), digest in hashes.digests().items()}
    return digest_of(cells), cells


def _compile(plan: Plan, rank: int, source: Source, memory: Tensor) -> list[tuple[Bucket, list[Step]]]:
    """What this rank does for each bucket that it writes into."""
    return [
        (
            bucket,
            [
                (source.copier(plan, chunk), bytes_of(memory, bucket, chunk, plan.cell_bytes))
                for chunk in chunks(pieces_of(bucket, memory, rank))
            ],
        )
        for bucket in plan.buckets
        if rank in bucket.owners
    ]


def _scan(plan: Plan, rank: int, source: Source) -> list[tuple[Bucket, list[Step]]]:
    """As `_compile`, into memory that stays in the processor's cache: the bytes are only hashed.

    They go through a copy because that is where a source casts them or fetches them from a device.
    """
    nowhere = torch.empty(1, dtype=torch.uint8).expand(plan.arena_bytes)
    parts = [
        (bucket, list(chunks(pieces_of(bucket, nowhere, rank))))
        for bucket in plan.buckets
        if rank in bucket.owners
    ]
    size = max((room_for(chunk) for _, several in parts for chunk in several), default=0)
    room = torch.empty(size, dtype=torch.uint8)
    scan = []
    for bucket, several in parts:
        moved = [rehoused(chunk, bucket, room, plan.cell_bytes) for chunk in several]
        scan.append((bucket, [(source.copier(plan, pieces), views) for pieces, views in moved]))
    return scan
