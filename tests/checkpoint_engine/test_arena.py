"""Bytes in, the same bytes out, or an error."""

from __future__ import annotations

import mmap
import os

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.arena import WeightArena, read_arena
from k2rl.checkpoint_engine.manifest import Manifest, WeightTransferError

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_what_is_written_is_read(shapes: list[list[int]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = [
        (f"t{index}", torch.randint(0, 100, shape, generator=generator).to(dtype))
        for index, shape in enumerate(shapes)
    ]
    arena = WeightArena()
    manifest = arena.write(sent, version=3)
    through_vllm = msgspec.convert(msgspec.to_builtins(manifest), Manifest)
    received = read_arena(through_vllm)
    arena.close()
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, ours), (_, theirs) in zip(sent, received, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_the_arena_is_reused_and_grows() -> None:
    arena = WeightArena()
    first = arena.write([("a", torch.zeros(100))], 0)
    second = arena.write([("a", torch.ones(100))], 1)
    assert second.path == first.path
    assert torch.equal(read_arena(second)[0][1], torch.ones(100))
    third = arena.write([("a", torch.full((100_000,), 2.0))], 2)
    assert torch.equal(read_arena(third)[0][1], torch.full((100_000,), 2.0))
    arena.close()


def test_a_flipped_bit_is_found_and_named() -> None:
    arena = WeightArena()
    manifest = arena.write([("good", torch.zeros(64)), ("bad", torch.zeros(64))], 0)
    fd = os.open(manifest.path, os.O_RDWR)
    with mmap.mmap(fd, manifest.nbytes) as memory:
        memory[manifest.records[1].offset + 5] ^= 1
    os.close(fd)
    with pytest.raises(WeightTransferError, match="bad arrived corrupted"):
        read_arena(manifest)
    arena.close()


def test_a_stale_manifest_is_refused() -> None:
    """The arena holds newer bytes than the manifest speaks of."""
    arena = WeightArena()
    stale = arena.write([("a", torch.zeros(64))], 0)
    arena.write([("a", torch.ones(64))], 1)
    with pytest.raises(WeightTransferError, match="corrupted"):
        read_arena(stale)
    arena.close()


def test_a_sender_that_is_gone_is_an_error() -> None:
    arena = WeightArena()
    manifest = arena.write([("a", torch.zeros(64))], 0)
    arena.close()
    with pytest.raises(WeightTransferError, match="cannot map"):
        read_arena(manifest)


def test_the_receiver_cannot_harm_the_sender() -> None:
    arena = WeightArena()
    manifest = arena.write([("a", torch.zeros(64))], 0)
    read_arena(manifest)[0][1].fill_(9)
    assert torch.equal(read_arena(manifest)[0][1], torch.zeros(64))
    arena.close()
