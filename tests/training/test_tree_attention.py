"""Attention in query blocks against a dense mask over the whole row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from k2rl.models.logit_probe import LogitProbe
from k2rl.training.tree_attention import QueryBlock, Tree, plan_blocks, tree_attention


@st.composite
def trees(draw: st.DrawFn) -> Tensor:
    """A random forest in depth-first order, as the end of each position's subtree."""
    size = draw(st.integers(1, 40))
    depths = [0]
    for _ in range(size - 1):
        depths.append(draw(st.integers(0, depths[-1] + 1)))
    ends = [
        next((later for later in range(i + 1, size) if depths[later] <= depths[i]), size) for i in range(size)
    ]
    return torch.tensor(ends)


def dense_mask(subtree_end: Tensor) -> Tensor:
    position = torch.arange(len(subtree_end))
    return (position[None, :] <= position[:, None]) & (position[:, None] < subtree_end[None, :])


def inputs(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Six query heads on two key heads; values of another width than keys."""
    generator = torch.Generator().manual_seed(length)
    shapes = ((1, 6, length, 8), (1, 2, length, 8), (1, 2, length, 4))
    query, key, value = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    return query, key, value


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    keys, values = key.repeat_interleave(3, dim=1), value.repeat_interleave(3, dim=1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)


class Planned(Tree):
    """In blocks of another size."""

    def __init__(self, subtree_end: Tensor, size: int) -> None:
        super().__init__(subtree_end)
        self._size = size

    @property
    def blocks(self) -> tuple[QueryBlock, ...]:  # type: ignore[override]
        return plan_blocks(self.subtree_end, self._size)


@given(trees(), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_blocks_compute_what_a_dense_mask_computes(subtree_end: Tensor, block: int) -> None:
    query, key, value = inputs(len(subtree_end))
    output, _ = tree_attention(nn.Module(), query, key, value, None, tree=Planned(subtree_end, block))
    expected = dense(query, key, value, dense_mask(subtree_end))
    torch.testing.assert_close(output, expected)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((output * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@given(trees(), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_the_probe_sees_the_largest_visible_logit_of_each_head(subtree_end: Tensor, block: int) -> None:
    query, key, value = inputs(len(subtree_end))
    layer, probe = nn.Module(), LogitProbe(3, 6)
    layer.layer_idx = 2
    with_probe, _ = tree_attention(
        layer, query, key, value, None, scaling=0.3, tree=Planned(subtree_end, block), probe=probe
    )
    without, _ = tree_attention(layer, query, key, value, None, scaling=0.3, tree=Planned(subtree_end, block))
    assert torch.equal(with_probe, without)
    logits = 0.3 * query.detach()[0] @ key.detach()[0].repeat_interleave(3, dim=0).mT
    expected = logits.masked_fill(~dense_mask(subtree_end), -torch.inf).amax(dim=(1, 2))
    taken = probe.take()
    torch.testing.assert_close(taken[2], expected)
    assert bool(torch.isinf(taken[:2]).all())


def test_blocks_meet_only_the_keys_they_need() -> None:
    """Two groups of a prompt of 4 and three branches of 4: no block reads a foreign branch or group."""
    ends = []
    for start in (0, 16):
        ends += [start + 16] * 4 + [start + 8] * 4 + [start + 12] * 4 + [start + 16] * 4
    runs = [block.key_runs for block in plan_blocks(torch.tensor(ends), size=4)]
    first = [((0, 4),), ((0, 8),), ((0, 4), (8, 12)), ((0, 4), (12, 16))]
    second = [tuple((a + 16, b + 16) for a, b in run) for run in first]
    assert runs == first + second


def test_bfloat16_scores_are_float32() -> None:
    query, key, value = inputs(12, torch.bfloat16)
    tree = Tree(torch.full((12,), 12))
    output, weights = tree_attention(nn.Module(), query, key, value, None, scaling=0.5, tree=tree)
    assert weights is None
    assert output.dtype == torch.bfloat16
    exact = dense(query.float() * 0.5 * 8**0.5, key.float(), value.float(), dense_mask(torch.full((12,), 12)))
    torch.testing.assert_close(output, exact.to(torch.bfloat16))
    output.float().square().sum().backward()
    assert [tensor.grad.dtype for tensor in (query, key, value) if tensor.grad is not None] == [
        torch.bfloat16
    ] * 3


def test_nothing_is_made_on_another_device() -> None:
    """A GPU is stood for by a device without memory: a CPU's tensor among its own is refused."""
    query, key, value = (tensor.detach().to("meta").requires_grad_() for tensor in inputs(12))
    tree = Tree(torch.tensor([12] * 4 + [8] * 4 + [12] * 4)).to(torch.device("meta"))
    layer, probe = nn.Module(), LogitProbe(1, 6, "meta")
    layer.layer_idx = 0  # type: ignore[assignment]
    output, _ = tree_attention(layer, query, key, value, None, tree=tree, probe=probe)
    output.sum().backward()
    assert {tensor.device.type for tensor in (output, probe.take(), query.grad, key.grad)} == {"meta"}


@pytest.mark.parametrize("length", [1, 9])
def test_without_a_tree_it_is_plain_causal_attention(length: int) -> None:
    query, key, value = inputs(length)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    output, _ = tree_attention(module, query, key, value, None)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    torch.testing.assert_close(output, dense(query, key, value, causal))
