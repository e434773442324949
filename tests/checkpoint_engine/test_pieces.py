"""A bucket's bytes, however it is cut: each once, with the same digest for who wrote and who reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine import pieces as pieces_module
from k2rl.checkpoint_engine.cells import CellHashes, rows_in
from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec
from k2rl.checkpoint_engine.pieces import (
    Piece,
    Remembered,
    blocks_of,
    bytes_of,
    chunks,
    pieces_of,
    rehoused,
    room_for,
)
from k2rl.checkpoint_engine.plan import WHOLE_BUCKET, Bucket, Part, Plan, plan_push


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Rows of several owners, in turns; sometimes only columns of them."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=5))
    specs = (
        *(TensorSpec(f"t{i}", "int8", shape) for i, shape in enumerate(shapes)),
        TensorSpec("s", "int8", ()),
    )
    cut = draw(st.integers(1, 7))
    shards = tuple(
        Shard(i, draw(st.integers(0, 2)), row, min(row + cut, spec.rows))
        for i, spec in enumerate(specs)
        for row in range(0, spec.rows, cut)
    )
    needs = {0: {f"t{i}": [((0, rows), (columns // 2, columns))] for i, (rows, columns) in enumerate(shapes)}}
    return plan_push(
        Manifest(specs, shards), [0], bucket_bytes=2048, needs=needs if draw(st.booleans()) else None
    )


def digests(
    memory: torch.Tensor, bucket: Bucket, cut: Iterable[list[Piece]], cell_bytes: int
) -> dict[int, str]:
    """By owner, as senders and receivers compute them."""
    hashes = CellHashes(cell_bytes)
    for chunk in cut:
        hashes.update(bytes_of(memory, bucket, chunk, cell_bytes))
    return hashes.of_owners()


def scanned(
    memory: torch.Tensor, bucket: Bucket, cut: Iterable[list[Piece]], cell_bytes: int
) -> dict[int, str]:
    """The same from copies, as they are made to look for changes."""
    hashes = CellHashes(cell_bytes)
    for chunk in cut:
        room = torch.zeros(room_for(chunk), dtype=torch.uint8)
        moved, views = rehoused(chunk, bucket, room, cell_bytes)
        for piece, copy in zip(chunk, moved, strict=True):
            copy.memory.copy_(piece.memory)
        hashes.update(views)
    return hashes.of_owners()


@settings(max_examples=60, deadline=None)
@given(
    plans(),
    st.integers(1, 500),
    st.integers(1, 300) | st.just(WHOLE_BUCKET),
    st.integers(1, 900),
    st.integers(1, 900),
)
def test_pieces_hold_every_byte_once_and_all_agree_on_the_digests(
    plan: Plan, piece_bytes: int, cell_bytes: int, one: int, other: int
) -> None:
    memory = torch.randint(0, 256, (plan.arena_bytes,), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "CHUNK_BYTES", piece_bytes)
        for bucket in plan.buckets:
            expected = Counter(
                (part.owner, bucket.offset + byte)
                for block in bucket.blocks
                for part in block.parts
                for byte in range(block.place(part)[0], sum(block.place(part)))
            )
            read = list(pieces_of(bucket, memory))
            assert Counter((o, i) for p in read for o, a, b in p.runs for i in range(a, b)) == expected
            for piece in (*read, *blocks_of(bucket, memory)):
                assert sum(stop - start for _, start, stop in piece.runs) == piece.memory.numel()
                assert piece.memory.data_ptr() == memory.data_ptr() + piece.runs[0][1]
            views = digests(memory, bucket, chunks(read, one), cell_bytes)
            assert views == digests(memory, bucket, chunks(read, other), cell_bytes)
            assert views == digests(memory, bucket, chunks(blocks_of(bucket, memory), other), cell_bytes)
            assert views.keys() == set(bucket.owners)
            for owner in bucket.owners:
                written = list(pieces_of(bucket, memory, owner))
                assert digests(memory, bucket, chunks(written, other), cell_bytes) == {owner: views[owner]}
                assert scanned(memory, bucket, chunks(written, other), cell_bytes) == {owner: views[owner]}


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 300), st.data())
def test_a_changed_byte_is_found_in_the_rows_of_its_cell(
    plan: Plan, cell_bytes: int, data: st.DataObject
) -> None:
    memory = torch.randint(0, 256, (plan.arena_bytes,), dtype=torch.uint8)
    bucket = data.draw(st.sampled_from(plan.buckets))
    block = data.draw(st.sampled_from(bucket.blocks))
    part = data.draw(st.sampled_from(block.parts))
    offset, nbytes = block.place(part)
    byte = data.draw(st.integers(offset, offset + nbytes - 1))

    def cells() -> dict[tuple[int, int], bytes]:
        hashes = CellHashes(cell_bytes)
        for chunk in chunks(pieces_of(bucket, memory)):
            hashes.update(bytes_of(memory, bucket, chunk, cell_bytes))
        return hashes.digests()

    before = cells()
    memory[bucket.offset + byte] ^= 1
    after = cells()
    assert [cell for cell in before if before[cell] != after[cell]] == [(part.owner, byte // cell_bytes)]
    rows = list(rows_in(bucket, part.owner, [byte // cell_bytes], cell_bytes))
    row = part.start + (byte - offset) // (nbytes // (part.stop - part.start))
    assert any(tensor == block.tensor and start <= row < stop for tensor, start, stop in rows)
    for tensor, start, stop in rows:
        # Nothing but what lies in the cell, in rows of the same owner.
        for number in range(start, stop):
            ((first, size),) = (
                found.place(Part(part.owner, number, number + 1))
                for found in bucket.blocks
                for held in found.parts
                if found.tensor == tensor and held.owner == part.owner and held.start <= number < held.stop
            )
            assert first // cell_bytes <= byte // cell_bytes <= (first + size - 1) // cell_bytes


def test_the_last_two_are_remembered() -> None:
    known, made = Remembered[int](), []

    def make(key: int) -> int:
        return known.get(key, lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    assert [make(key) for key in (1, 2, 1, 2, 3, 2, 1)] == [1, 2, 1, 2, 3, 2, 1]
    assert made == [1, 2, 3, 1]
