"""From a manifest to an immutable plan of a push: pure, hashable; executor and simulator both follow it.

A plan cuts the weights into buckets. A bucket is a run of bytes in every host's arena; it holds blocks,
each a box of one tensor laid out contiguously, whose rows are written by one or more owners. Blocks of
different owners share buckets: there are as many buckets as the bytes need, not as many as there are ranks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import msgspec
import xxhash

from k2rl.checkpoint_engine.manifest import ITEM_BYTES, Manifest, TensorSpec

Strategy = Literal["broadcast", "shard_aware", "delta"]

#: Blocks start at multiples of this many bytes: whole cache lines, and enough for any vector or DMA access.
ALIGNMENT = 256

#: Places of a ring: one is filled, one is on the wire, one is applied.
RING_SLOTS = 3

#: A delta that would have more than this share of the bytes goes as a full push, which builds on no version.
MOST_CHANGED = 0.5

#: Ranges along each dimension: `((0, 4), (8, 16))` is rows 0 to 3, columns 8 to 15.
Box = tuple[tuple[int, int], ...]

#: By tensor name, the boxes that a receiver needs; a tensor that is not named is not needed.
Needs = Mapping[str, Sequence[Box]]

#: By tensor name, ranges of rows.
Rows = Mapping[str, Iterable[tuple[int, int]]]


class PlanError(ValueError):
    """The weights cannot be pushed with this much memory."""


class Part(msgspec.Struct, frozen=True):
    """Rows `start` to `stop` (of the tensor) of a block, written by trainer rank `owner`."""

    owner: int
    start: int
    stop: int


class Block(msgspec.Struct, frozen=True):
    """A box of tensor number `tensor`, row-major and contiguous at `offset` of its bucket."""

    tensor: int
    box: Box
    offset: int
    nbytes: int
    parts: tuple[Part, ...]

    def place(self, part: Part) -> tuple[int, int]:
        """First byte, in the bucket, and number of bytes of a part."""
        start, stop = self.box[0] if self.box else (0, 1)
        row = self.nbytes // (stop - start)
        return self.offset + (part.start - start) * row, (part.stop - part.start) * row


#: For `Plan.cell_bytes`: more than a bucket can have.
WHOLE_BUCKET = 1 << 62


class Bucket(msgspec.Struct, frozen=True, dict=True):
    """What is transferred, applied and acknowledged at once; it lies at `offset` of the arena."""

    index: int
    offset: int
    nbytes: int
    #: Ids of the receivers that apply it.
    receivers: tuple[int, ...]
    blocks: tuple[Block, ...]
    #: The earlier bucket in the same place, to be applied before this one is written; -1: none.
    after: int = -1

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """Ranks that write into it, ascending."""
        return tuple(sorted({part.owner for block in self.blocks for part in block.parts}))


class Plan(msgspec.Struct, frozen=True, dict=True):
    """A push, decided in full before a byte moves."""

    strategy: Strategy
    tensors: tuple[TensorSpec, ...]
    #: Bytes of every host's arena.
    arena_bytes: int
    #: Bucket places that are used in turn; 0: each bucket has its own, and the arena holds the whole version.
    slots: int
    buckets: tuple[Bucket, ...]
    receivers: tuple[int, ...]
    #: Of a delta: the version that receivers, and arenas that retain it, must hold exactly.
    base: int | None = None
    #: Bytes of the windows of a bucket that are hashed each for itself; see `cells.py`.
    cell_bytes: int = WHOLE_BUCKET

    @cached_property
    def digest(self) -> str:
        """Equal for equal plans, on every machine."""
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(self))

    @property
    def retains(self) -> bool:
        """Whether the arena holds the whole version after the push, for others to pull."""
        return self.slots == 0

    @cached_property
    def nbytes(self) -> int:
        """Bytes that owners write."""
        return sum(block.nbytes for bucket in self.buckets for block in bucket.blocks)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """Ranks that write anything, ascending."""
        return tuple(sorted({owner for bucket in self.buckets for owner in bucket.owners}))


#: Of a participant that has not seen one.
NO_PLAN = Plan("broadcast", (), 0, 0, (), ())


def plan_push(
    manifest: Manifest,
    receivers: Sequence[int],
    *,
    bucket_bytes: int,
    slots: int = 0,
    needs: Mapping[int, Needs] | None = None,
    cell_bytes: int = WHOLE_BUCKET,
) -> Plan:
    """Plan a push of everything to `receivers`.

    Args:
        manifest: the weights and their owners.
        receivers: ids of those that apply them.
        bucket_bytes: most bytes in a bucket.
        slots: bucket places used in turn, at least 2; 0 gives every bucket its own, so that the arena keeps
            the version (`Plan.retains`).
        needs: of each receiver, for the strategy `shard_aware`. Default: `broadcast`, everything to everyone.
        cell_bytes: how finely changes are found, if deltas will follow. Small cells make hashing slower.

    Raises:
        PlanError: a unit is larger than a bucket; says the size that is needed. Or a receiver needs what
            is not there.
        ManifestError: the manifest is not complete.
    """
    manifest.check()
    if slots == 1:
        raise PlanError(
            "one slot cannot overlap filling and applying: use at least 2, or 0 to keep everything"
        )
    builder = _Builder(manifest, bucket_bytes, slots, cell_bytes)
    if needs is not None:
        _check_needs(manifest, needs)
    for audience, boxes in _audiences(manifest, receivers, needs):
        builder.add(audience, boxes)
    return builder.plan("broadcast" if needs is None else "shard_aware", tuple(receivers))


def plan_delta(
    manifest: Manifest,
    full: Plan,
    changed: Rows,
    base: int,
    together: Iterable[Collection[str]] = (),
) -> Plan:
    """Plan a push of what has changed.

    If the full plan retains, blocks have the places that they have in it: written there, they make an arena's
    copy of version `base` a copy of the new one.

    Args:
        manifest: the weights and their owners.
        full: the plan for a push of all of them to all receivers.
        changed: the rows that differ from version `base`, by tensor name.
        base: the version that receivers hold.
        together: sets of tensors that receivers take whole and together or not at all.

    Returns:
        A plan of the strategy `delta`; `full` if that would be more than `MOST_CHANGED` of the bytes.

    Raises:
        PlanError: what has changed is not there, or the full plan does not bring everything to everyone.
    """
    if full.strategy != "broadcast":
        raise PlanError(f"a delta goes to all receivers alike, and not as {full.strategy}")
    boxes = _changed_boxes(manifest, changed, together)
    bucket_bytes = max((bucket.nbytes for bucket in full.buckets), default=0)
    builder = _Builder(manifest, bucket_bytes, full.slots, full.cell_bytes)
    nbytes = sum(_nbytes(manifest.tensors[index], box) for index, several in boxes.items() for box in several)
    if nbytes > MOST_CHANGED * manifest.nbytes:
        return full
    if full.retains:
        return _in_place(full, boxes, base)
    builder.add(full.receivers, boxes)
    return builder.plan("delta", full.receivers, base)


def fit_bucket(
    manifest: Manifest,
    memory_budget: int,
    slots: int = RING_SLOTS,
    needs: Mapping[int, Needs] | None = None,
) -> int:
    """The bucket size with which a ring of `slots` stays within `memory_budget` bytes of each host.

    Raises:
        PlanError: not even the largest unit fits; says the budget that is needed.
    """
    largest = largest_unit(manifest, needs)
    needed = largest.nbytes * slots
    if memory_budget < needed:
        raise PlanError(
            f"a memory budget of {memory_budget:,} bytes is too small: {largest.name} alone has "
            f"{largest.nbytes:,}, and {slots} slots of that size need {needed:,}"
        )
    return memory_budget // slots // ALIGNMENT * ALIGNMENT


class Unit(NamedTuple):
    """Tensors that travel together: the name of the first, and their bytes in a bucket."""

    name: str
    nbytes: int


def largest_unit(manifest: Manifest, needs: Mapping[int, Needs] | None = None) -> Unit:
    """The smallest bucket is as large as this; `needs` as for `plan_push`."""
    tensors = manifest.tensors
    audiences = [boxes for _, boxes in _audiences(manifest, tuple(needs or ()), needs)]
    sizes = (
        Unit(tensors[unit[0]].name, sum(aligned(_nbytes(tensors[i], box)) for i in unit for box in boxes[i]))
        for boxes in audiences
        for unit in _units(manifest, boxes)
    )
    return max(sizes, key=lambda unit: unit.nbytes, default=Unit("", 0))


class _Builder:
    """Packs units into buckets in the order in which they come."""

    def __init__(self, manifest: Manifest, bucket_bytes: int, slots: int, cell_bytes: int) -> None:
        self._manifest = manifest
        self._bucket_bytes = bucket_bytes // ALIGNMENT * ALIGNMENT
        self._slots = slots
        self._cell_bytes = cell_bytes
        self._buckets: list[Bucket] = []
        self._end = 0
        self._load: dict[int, int] = {}

    def add(self, audience: tuple[int, ...], boxes: Mapping[int, Sequence[Box]]) -> None:
        """Everything that one set of receivers gets."""
        blocks: list[Block] = []
        used = 0
        for unit in _units(self._manifest, boxes):
            # A tensor without elements has nothing to send.
            sized = [(i, box, _nbytes(self._manifest.tensors[i], box)) for i in unit for box in boxes[i]]
            pieces = [piece for piece in sized if piece[2]]
            size = sum(aligned(nbytes) for _, _, nbytes in pieces)
            if size > self._bucket_bytes:
                raise PlanError(
                    f"{self._manifest.tensors[unit[0]].name} needs a bucket of {size:,} bytes; "
                    f"buckets have {self._bucket_bytes:,}"
                )
            if used + size > self._bucket_bytes:
                self._close(audience, blocks, used)
                blocks, used = [], 0
            for index, box, nbytes in pieces:
                blocks.append(Block(index, box, used, nbytes, self._parts(index, box, nbytes)))
                used += aligned(nbytes)
        self._close(audience, blocks, used)

    def _close(self, audience: tuple[int, ...], blocks: list[Block], used: int) -> None:
        if not blocks:
            return
        index = len(self._buckets)
        if self._slots:
            offset, after = (index % self._slots) * self._bucket_bytes, max(index - self._slots, -1)
        else:
            offset, after = self._end, -1
        self._buckets.append(Bucket(index, offset, used, audience, tuple(blocks), after))
        self._end = max(self._end, offset + used)

    def _parts(self, index: int, box: Box, nbytes: int) -> tuple[Part, ...]:
        """Who writes which rows: of several owners of the same rows, the one with the least to do so far."""
        row, last = box[0] if box else (0, 1)
        row_bytes = nbytes // max(last - row, 1)
        shards = self._manifest.shards_of[index]
        parts = []
        while row < last:
            holders = [shard for shard in shards if shard.start <= row < shard.stop]
            holder = min(holders, key=lambda shard: (self._load.get(shard.owner, 0), shard.owner))
            stop = min(holder.stop, last)
            parts.append(Part(holder.owner, row, stop))
            self._load[holder.owner] = self._load.get(holder.owner, 0) + (stop - row) * row_bytes
            row = stop
        return tuple(parts)

    def plan(self, strategy: Strategy, receivers: tuple[int, ...], base: int | None = None) -> Plan:
        return Plan(
            strategy,
            self._manifest.tensors,
            self._end,
            self._slots,
            tuple(self._buckets),
            receivers,
            base,
            self._cell_bytes,
        )


def _changed_boxes(
    manifest: Manifest, changed: Rows, together: Iterable[Collection[str]]
) -> dict[int, list[Box]]:
    """What a delta brings: rows, and of tensors that belong together all of all of them."""
    indices = {spec.name: index for index, spec in enumerate(manifest.tensors)}
    if unknown := sorted(changed.keys() - indices.keys()):
        raise PlanError(f"{unknown[0]} changed, which nobody sends")
    boxes: dict[int, list[Box]] = {}
    for name, rows in changed.items():
        spec = manifest.tensors[indices[name]]
        # What lies closer together than blocks may would take more room apart.
        apart = ALIGNMENT // max(spec.nbytes // max(spec.rows, 1), 1)
        if spec.nbytes and (ranges := merged_rows(rows, spec.rows, apart)):
            boxes[indices[name]] = [(cut, *whole(spec)[1:]) if spec.shape else () for cut in ranges]
    groups = [{indices[name] for name in names if name in indices} for names in together]
    reached, left = set(boxes), groups
    while touched := [group for group in left if group & reached]:
        reached.update(*touched)
        left = [group for group in left if group not in touched]
        for index in set().union(*touched):
            boxes[index] = [whole(manifest.tensors[index])]
    return boxes


def merged_rows(rows: Iterable[tuple[int, int]], length: int, apart: int = 0) -> list[tuple[int, int]]:
    """Ranges of rows in order, within 0 to `length`; those that are at most `apart` rows apart as one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((max(start, 0), min(stop, length)) for start, stop in rows):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1] + apart:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _in_place(full: Plan, boxes: Mapping[int, Sequence[Box]], base: int) -> Plan:
    """A plan that writes only these rows, each where the full plan has it, and by whom."""
    buckets: list[Bucket] = []
    for bucket in full.buckets:
        blocks = [
            _rows_of(block, box)
            for block in bucket.blocks
            for box in boxes.get(block.tensor, ())
            if block.nbytes
        ]
        if blocks:
            buckets.append(
                Bucket(len(buckets), bucket.offset, bucket.nbytes, bucket.receivers, tuple(blocks))
            )
    return Plan(
        "delta",
        full.tensors,
        full.arena_bytes,
        0,
        tuple(buckets),
        full.receivers,
        base,
        full.cell_bytes,
    )


def _rows_of(block: Block, box: Box) -> Block:
    if box == block.box:
        return block
    start, stop = box[0]
    parts = tuple(
        Part(part.owner, max(part.start, start), min(part.stop, stop))
        for part in block.parts
        if part.start < stop and part.stop > start
    )
    offset, nbytes = block.place(Part(0, start, stop))
    return Block(block.tensor, box, offset, nbytes, parts)


def whole(spec: TensorSpec) -> Box:
    """All of a tensor."""
    return tuple((0, length) for length in spec.shape)


def _nbytes(spec: TensorSpec, box: Box) -> int:
    return math.prod(stop - start for start, stop in box) * ITEM_BYTES[spec.dtype]


def aligned(nbytes: int) -> int:
    """The next place at which a block may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _units(manifest: Manifest, tensors: Mapping[int, Sequence[Box]]) -> Iterator[list[int]]:
    """Indices of tensors that must travel together, in the order of the first of each."""
    units: dict[str, list[int]] = {}
    for index in sorted(tensors):
        spec = manifest.tensors[index]
        units.setdefault(spec.unit or f"\0{spec.name}", []).append(index)
    yield from units.values()


def _audiences(
    manifest: Manifest, receivers: Sequence[int], needs: Mapping[int, Needs] | None
) -> Iterator[tuple[tuple[int, ...], Mapping[int, Sequence[Box]]]]:
    """Sets of receivers and the boxes that go to exactly those; without `needs`, everything to all."""
    if needs is None:
        yield tuple(receivers), {index: (whole(spec),) for index, spec in enumerate(manifest.tensors)}
        return
    audiences: dict[tuple[int, ...], dict[int, list[Box]]] = {}
    for unit in _units(manifest, dict.fromkeys(range(len(manifest.tensors)), ())):
        wanted: dict[tuple[tuple[int, Box], ...], list[int]] = {}
        for receiver in receivers:
            boxes = [
                (index, tuple((start, stop) for start, stop in box))
                for index in unit
                for box in needs[receiver].get(manifest.tensors[index].name, ())
            ]
            # What must travel together goes to one audience, even if others need some of it, too.
            for together in [tuple(boxes)] if len(unit) > 1 else [(box,) for box in boxes]:
                wanted.setdefault(together, []).append(receiver)
        for together, audience in wanted.items():
            for index, box in together:
                audiences.setdefault(tuple(audience), {}).setdefault(index, []).append(box)
    yield from audiences.items()


def _check_needs(manifest: Manifest, needs: Mapping[int, Needs]) -> None:
    specs = {spec.name: spec for spec in manifest.tensors}
    for receiver, boxes_of in needs.items():
        for name, boxes in boxes_of.items():
            if name not in specs:
                raise PlanError(f"receiver {receiver} needs {name}, which nobody sends")
            shape = specs[name].shape
            for box in boxes:
                if len(box) != len(shape) or any(
                    not 0 <= start <= stop <= length for (start, stop), length in zip(box, shape, strict=True)
                ):
                    raise PlanError(f"receiver {receiver} needs {name}{list(box)}, which has {list(shape)}")
