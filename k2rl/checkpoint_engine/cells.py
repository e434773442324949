"""Digests of a bucket, cell by cell: what a push is verified by, and what tells which rows have changed.

A cell is a fixed window of a bucket's bytes (`Plan.cell_bytes`; all of it where no deltas will follow). An
owner's digest of a bucket is that of its cells' digests: so a trainer rank that has looked for changes knows
the digests of whole buckets, unchanged cells included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import xxhash

from k2rl.checkpoint_engine.plan import Bucket

#: For pushes that deltas may follow. What has changed is sent in whole cells, so they are small; a call of
#: the hash costs as much as 8 KiB of hashing, and its digest takes some 200 bytes of memory, so they are not
#: smaller.
CELL_BYTES = 1 << 17

#: Owner, and number of the cell in its bucket.
Cell = tuple[int, int]


def cut(owner: int, start: int, view: memoryview, cell_bytes: int) -> Iterable[tuple[Cell, memoryview]]:
    """Bytes of an owner, of which the first is byte `start` of the bucket, by cells."""
    done = 0
    while done < len(view):
        number, offset = divmod(start + done, cell_bytes)
        size = min(cell_bytes - offset, len(view) - done)
        yield (owner, number), view[done : done + size]
        done += size


class CellHashes:
    """Hashes a bucket, in the order of its bytes."""

    def __init__(self, cell_bytes: int) -> None:
        self._cell_bytes = cell_bytes
        self._hashes: dict[Cell, xxhash.xxh3_128] = {}
        self._digests: dict[Cell, bytes] = {}

    def update(self, views: Iterable[tuple[Cell, memoryview]]) -> None:
        hashes, whole = self._hashes, self._cell_bytes
        for cell, view in views:
            known = hashes.get(cell)
            if len(view) == whole:  # all of it: no need for an object, which costs as much as 16 KiB
                self._digests[cell] = xxhash.xxh3_128_digest(view)
            elif known is None:
                hashes[cell] = xxhash.xxh3_128(view)
            else:
                known.update(view)

    def digests(self) -> dict[Cell, bytes]:
        """Of each cell."""
        return {**self._digests, **{cell: known.digest() for cell, known in self._hashes.items()}}

    def of_owners(self) -> dict[int, str]:
        """Of each owner's part of the bucket."""
        by_owner: dict[int, dict[int, bytes]] = {}
        for (owner, number), digest in self.digests().items():
            by_owner.setdefault(owner, {})[number] = digest
        return {owner: digest_of(cells) for owner, cells in by_owner.items()}


def digest_of(cells: Mapping[int, bytes]) -> str:
    """One digest of the cells of an owner, by their numbers."""
    digest = xxhash.xxh3_128()
    for number in sorted(cells):
        digest.update(number.to_bytes(4, "big") + cells[number])
    return digest.hexdigest()


def rows_in(
    bucket: Bucket, owner: int, cells: Iterable[int], cell_bytes: int
) -> Iterable[tuple[int, int, int]]:
    """Rows that an owner has in these cells: number of the tensor, first row, one past the last."""
    wanted = set(cells)
    for block in bucket.blocks:
        for part in block.parts:
            if part.owner != owner:
                continue
            offset, nbytes = block.place(part)
            row_bytes = nbytes // (part.stop - part.start)
            for number in range(offset // cell_bytes, (offset + nbytes - 1) // cell_bytes + 1):
                if number not in wanted:
                    continue
                start = max(number * cell_bytes - offset, 0) // row_bytes
                stop = -(-min((number + 1) * cell_bytes - offset, nbytes) // row_bytes)
                yield block.tensor, part.start + start, part.start + stop
