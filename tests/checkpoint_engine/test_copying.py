"""Many copies at once do what `copy_` does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2rl.checkpoint_engine.copying import copies
from k2rl.checkpoint_engine.messages import TransferError
from k2rl.checkpoint_engine.pieces import pieces_of
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.receiver import TensorTarget
from k2rl.checkpoint_engine.sender import TensorSource

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Contiguous, transposed, or a slice of something larger."""
    dtype = draw(st.sampled_from(DTYPES))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["plain", "transposed", "strided"]))
    if layout == "strided" and shape:
        return torch.randint(0, 9, (*shape[:-1], shape[-1] * 2), generator=seed).to(dtype)[..., ::2]
    if layout == "transposed":
        return (
            torch.randint(0, 9, shape[::-1], generator=seed).to(dtype).permute(tuple(range(len(shape)))[::-1])
        )
    return torch.randint(0, 9, shape, generator=seed).to(dtype)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    return draw(tensors(shape)), draw(tensors(shape))


@settings(max_examples=60, deadline=None)
@given(st.lists(pairs(), max_size=5))
def test_copies_do_what_copy_does(found: list[tuple[Tensor, Tensor]]) -> None:
    expected = [target.clone().copy_(source) for target, source in found]
    copy = copies([target for target, _ in found], [source for _, source in found])
    for target, _ in found:
        target.zero_()
    copy()
    assert all(torch.equal(t.float(), e.float()) for (t, _), e in zip(found, expected, strict=True))
    for _, source in found:
        source.fill_(1)
    copy()
    assert all(bool((target == 1).all()) for target, _ in found), "whatever the sources hold by then"


def test_a_source_knows_when_its_copies_are_no_longer_right() -> None:
    """The same memory may become another tensor, or change its name."""
    one, other = torch.arange(9.0).view(3, 3), torch.zeros(3, 3)
    identities = {
        TensorSource([("a", one), ("b", other)], 0).identity,
        TensorSource([("a", one.t()), ("b", other)], 0).identity,
        TensorSource([("b", one), ("a", other)], 0).identity,
    }
    assert len(identities) == 3
    assert TensorSource([("a", one)], 0).identity == TensorSource([("a", one)], 0).identity


@pytest.mark.parametrize("shape", [(5, 4), (3, 4), (4,), (4, 4, 1)])
def test_a_target_of_another_shape_is_an_error_before_anything_is_changed(shape: tuple[int, ...]) -> None:
    plan = plan_push(TensorSource([("a", torch.ones(4, 4))], 0).manifest, [0], bucket_bytes=256)
    held = torch.zeros(shape)
    with pytest.raises(TransferError, match="a"):
        TensorTarget({"a": held}).begin(plan)
    assert not held.any()


@settings(max_examples=40, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=4), st.integers(0, 2))
def test_what_a_source_writes_a_target_reads(found: list[tuple[Tensor, Tensor]], slots: int) -> None:
    source = TensorSource([(f"t{i}", sent) for i, (sent, _) in enumerate(found)], 0)
    targets = {f"t{i}": torch.zeros_like(sent) for i, (sent, _) in enumerate(found)}
    target = TensorTarget(targets)
    plan = plan_push(source.manifest, [0], bucket_bytes=1 << 13, slots=slots * 2)
    memory = torch.zeros(plan.arena_bytes, dtype=torch.uint8)
    target.begin(plan)
    for bucket in plan.buckets:
        source.copier(plan, list(pieces_of(bucket, memory, owner=0)))()
        for _, place in target.steps(plan, bucket, memory):
            place()
    for i, (sent, _) in enumerate(found):
        assert torch.equal(targets[f"t{i}"].float(), sent.float())
    if all(sent.numel() for sent, _ in found):
        target.finish()
