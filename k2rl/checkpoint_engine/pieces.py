"""A bucket in pieces that are still in the processor's cache when they are hashed after copying."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from k2rl.checkpoint_engine.cells import Cell, CellHashes, cut
from k2rl.checkpoint_engine.plan import Box, Bucket, aligned

#: Bytes copied before they are hashed: few enough to be in the cache still, enough to hide Python.
CHUNK_BYTES = 1 << 19


class Piece(NamedTuple):
    """A box of tensor number `tensor`, its bytes in shared memory, and which of them each owner writes."""

    tensor: int
    box: Box
    memory: Tensor
    #: Owner, first byte, and one past the last, in the plan's places.
    runs: tuple[tuple[int, int, int], ...]


def pieces_of(bucket: Bucket, memory: Tensor, owner: int | None = None) -> Iterator[Piece]:
    """The pieces of a bucket, in the order of their bytes: rows of blocks.

    Args:
        bucket: to take apart.
        memory: uint8, the plan's places.
        owner: only what this trainer rank writes; default: everything.
    """
    for block in bucket.blocks:
        first, last = block.box[0] if block.box else (0, 1)
        row = block.nbytes // (last - first)
        step = max(CHUNK_BYTES // max(row, 1), 1)
        origin = bucket.offset + block.offset - first * row
        spans = (
            [(first, last)] if owner is None else [(p.start, p.stop) for p in block.parts if p.owner == owner]
        )
        for begin, end in spans:
            for start in range(begin, end, step):
                stop = min(start + step, end)
                runs = tuple(
                    (part.owner, origin + max(part.start, start) * row, origin + min(part.stop, stop) * row)
                    for part in block.parts
                    if part.start < stop and part.stop > start
                )
                box = ((start, stop), *block.box[1:]) if block.box else ()
                yield Piece(block.tensor, box, memory[origin + start * row : origin + stop * row], runs)


def blocks_of(bucket: Bucket, memory: Tensor) -> Iterator[Piece]:
    """The blocks of a bucket as one piece each, for those who must see them whole."""
    for block in bucket.blocks:
        start = bucket.offset + block.offset
        runs = []
        for part in block.parts:
            offset, nbytes = block.place(part)
            runs.append((part.owner, bucket.offset + offset, bucket.offset + offset + nbytes))
        yield Piece(block.tensor, block.box, memory[start : start + block.nbytes], tuple(runs))


def chunks(pieces: Iterable[Piece], nbytes: int = CHUNK_BYTES) -> Iterator[list[Piece]]:
    """Pieces that are together at most `nbytes`, or one."""
    chunk: list[Piece] = []
    used = 0
    for piece in pieces:
        if chunk and used + piece.memory.numel() > nbytes:
            yield chunk
            chunk, used = [], 0
        chunk.append(piece)
        used += piece.memory.numel()
    if chunk:
        yield chunk


def bytes_of(
    memory: Tensor, bucket: Bucket, chunk: Sequence[Piece], cell_bytes: int
) -> list[tuple[Cell, memoryview]]:
    """The bytes of these pieces of a bucket by cells, adjacent ones as one."""
    view = memory.numpy().data
    merged: list[tuple[int, int, int]] = []
    for piece in chunk:
        for owner, start, stop in piece.runs:
            if merged and merged[-1][0] == owner and merged[-1][2] == start:
                merged[-1] = (owner, merged[-1][1], stop)
            else:
                merged.append((owner, start, stop))
    return [
        found
        for owner, start, stop in merged
        for found in cut(owner, start - bucket.offset, view[start:stop], cell_bytes)
    ]


def rehoused(
    chunk: Sequence[Piece], bucket: Bucket, room: Tensor, cell_bytes: int
) -> tuple[list[Piece], list[tuple[Cell, memoryview]]]:
    """The same pieces with `room` (uint8, of `room_for` bytes) as their memory, and its bytes by cells."""
    moved: list[Piece] = []
    views: list[tuple[Cell, memoryview]] = []
    view, at = room.numpy().data, 0
    for piece in chunk:
        nbytes = piece.memory.numel()
        moved.append(piece._replace(memory=room[at : at + nbytes]))
        first = piece.runs[0][1]
        for owner, start, stop in piece.runs:
            written = view[at + start - first : at + stop - first]
            views += cut(owner, start - bucket.offset, written, cell_bytes)
        at += aligned(nbytes)
    return moved, views


def room_for(chunk: Sequence[Piece]) -> int:
    """Bytes that `rehoused` needs."""
    return sum(aligned(piece.memory.numel()) for piece in chunk)


def digests_of(bucket: Bucket, memory: Tensor, cell_bytes: int) -> dict[int, str]:
    """The digest of each owner's parts, as the owner says it when it has filled the bucket."""
    hashes = CellHashes(cell_bytes)
    for chunk in chunks(blocks_of(bucket, memory)):
        hashes.update(bytes_of(memory, bucket, chunk, cell_bytes))
    return hashes.of_owners()


T = TypeVar("T")


class Remembered(Generic[T]):
    """What was worked out for the last two keys: an arena has two generations, which take turns."""

    def __init__(self) -> None:
        self._known: dict[Hashable, T] = {}

    def get(self, key: Hashable, work_out: Callable[[], T]) -> T:
        value = self._known.pop(key, None)
        if value is None:
            value = work_out()
        self._known[key] = value
        if len(self._known) > 2:
            del self._known[next(iter(self._known))]
        return value

    def clear(self) -> None:
        self._known.clear()
