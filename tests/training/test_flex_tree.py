"""flex_attention under a tree's mask: the mask on a CPU, the kernels where CUDA is."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from k2rl.models.logit_probe import LogitProbe
from k2rl.training import flex_tree
from k2rl.training.flex_tree import Heads, tree_mask
from k2rl.training.tree_attention import Tree, tree_attention
from tests.training.test_tree_attention import dense, dense_mask, inputs, trees

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention's kernels are a GPU's")


def seen(mask: BlockMask) -> Tensor:
    """[T, T] bool: what a kernel that follows the tables lets through."""
    block, length = mask.BLOCK_SIZE[0], mask.shape[-1]
    position = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    allowed = mask.mask_mod(zero, zero, position[:, None], position[None, :])
    result = torch.zeros(length, length, dtype=torch.bool)
    tables = (
        (mask.kv_num_blocks, mask.kv_indices, allowed),
        (mask.full_kv_num_blocks, mask.full_kv_indices, torch.ones_like(allowed)),
    )
    for counts, indices, lets in tables:
        assert counts is not None
        assert indices is not None
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in indices[0, 0, row, :count].tolist():
                part = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
                assert not result[part].any(), "a block is in both tables"
                result[part] = lets[part]
    return result


@given(trees(), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_the_mask_lets_through_what_a_dense_mask_does(subtree_end: Tensor, block: int) -> None:
    mask, length = tree_mask(subtree_end, block), len(subtree_end)
    result = seen(mask)
    assert torch.equal(result[:length, :length], dense_mask(subtree_end))
    # Padding sees itself and is seen by itself alone.
    result[:length, :length] = False
    assert result.nonzero().tolist() == [[i, i] for i in range(length, mask.shape[-1])]


@given(trees(), st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_its_tables_are_those_that_torch_finds_in_the_whole_matrix(subtree_end: Tensor, block: int) -> None:
    """The kernel of the backward pass goes by the tables of keys' blocks."""
    mask = tree_mask(subtree_end, block)
    size = mask.shape[-1]
    theirs = create_block_mask(mask.mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=block)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(theirs, name)), name
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_q_num_blocks", "full_q_indices")):
        for row, count in enumerate(getattr(mask, counts)[0, 0].tolist()):
            ours = getattr(mask, indices)[0, 0, row, :count]
            assert torch.equal(ours, getattr(theirs, indices)[0, 0, row, :count])


@pytest.mark.parametrize("length", [1, 128, 300])
def test_outputs_are_those_of_a_dense_mask(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the code that torch has for CPUs: forward, without the largest logits."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    query, key, value = (tensor.detach() for tensor in inputs(length))
    end = torch.full((length,), length)
    end[length // 4 : length // 2] = length // 2
    output, maxima = flex_tree.attend(query, key, value, 0.3, tree_mask(end), probed=False)
    assert maxima is None
    expected = dense(query * 0.3 * 8**0.5, key, value, dense_mask(end))
    torch.testing.assert_close(output, expected)


@pytest.mark.slow
def test_new_lengths_are_not_traced_again() -> None:
    """What comes before a GPU's compiler is the same on a CPU; the scale is a number in the kernel."""
    graphs, scales = 0, set()

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        scales.update(node.args[5] for node in graph.graph.nodes if "flex" in str(node.target))
        return graph

    traced = torch.compile(flex_tree._attend, dynamic=True, fullgraph=True, backend=count)
    for length in (520, 30, 256):
        query, key, value = (tensor.detach() for tensor in inputs(length))
        mask = tree_mask(torch.full((length,), length))
        rows = [flex_tree._in_blocks(row, mask.shape[-1] - length) for row in (query, key, value)]
        output, _ = traced(*rows, mask, repr(0.3))
        expected = dense(query * 0.3 * 8**0.5, key, value, dense_mask(torch.full((length,), length)))
        torch.testing.assert_close(output[:, :, :length].transpose(1, 2), expected)
    assert graphs <= 2, "one more where the first number of blocks was another size"
    assert scales == {0.3}


def test_a_cpu_goes_block_by_block(caplog: pytest.LogCaptureFixture) -> None:
    assert not flex_tree.fits(Heads.of(*inputs(9)))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotImplementedError("at least 16\nmore"), "NotImplementedError: at least 16"),
        (None, "a trial row is off by 0.5"),
    ],
)
def test_what_the_kernel_refuses_or_gets_wrong_is_told_once(
    error: Exception | None, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gap(heads: Heads) -> float:
        if error:
            raise error
        return 0.5

    monkeypatch.setattr(flex_tree, "_gap", gap)
    monkeypatch.setattr(flex_tree.importlib.util, "find_spec", lambda name: name)
    heads = Heads(torch.device("cuda"), torch.bfloat16, 6, 2, 8, 8 if error else 9)
    with caplog.at_level(logging.WARNING):
        assert [flex_tree.fits(heads), flex_tree.fits(heads)] == [False, False]
    (record,) = caplog.records
    assert told in record.getMessage()
    flex_tree.fits.cache_clear()


@pytest.mark.parametrize(("factor", "found_right"), [(1.0, True), (1.2, False)])
def test_the_trial_finds_a_wrong_kernel(
    factor: float, found_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention by blocks stands for the kernel, which a CPU has not."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, scale: float, mask: BlockMask, probed: bool
    ) -> tuple[Tensor, Tensor]:
        layer, probe = nn.Module(), LogitProbe(1, query.shape[1])
        layer.layer_idx = 0  # type: ignore[assignment]
        length = query.shape[2]
        ends = seen(mask)[:length, :length].sum(dim=0) + torch.arange(length)
        output, _ = tree_attention(
            layer, query, key, value, None, scaling=factor * scale, tree=Tree(ends), probe=probe
        )
        return output, probe.take()[0]

    monkeypatch.setattr(flex_tree, "attend", attend)
    heads = Heads(torch.device("cpu"), torch.bfloat16, 6, 2, 8, 4)
    with torch.no_grad():
        reason = flex_tree._trial(heads)
    assert (reason is None) == found_right, reason


def test_without_triton_it_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flex_tree.importlib.util, "find_spec", lambda name: None)
    assert not flex_tree.fits(Heads(torch.device("cuda"), torch.bfloat16, 4, 4, 16, 16))
    assert "Triton" in caplog.text
    flex_tree.fits.cache_clear()


SHAPES = {  # each costs some ten seconds of compilation
    "grouped": (9, 3, 64, 64),
    "latent, in miniature": (4, 4, 96, 32),
    "latent, K2's": (4, 4, 192, 128),
}


@on_cuda
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_uses_it(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    heads = Heads(torch.device("cuda", 0), torch.bfloat16, *SHAPES[shape])
    assert flex_tree.fits(heads), caplog.text


@on_cuda
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_computes_what_a_cpu_does(shape: str) -> None:
    """Rows of several lengths, whole blocks and not: outputs, largest logits and gradients."""
    query_heads, key_heads, width, value_width = SHAPES[shape]
    for length in (7, 128, 640, 1000):
        end = torch.full((length,), length)
        end[length // 4 : length // 2] = length // 2
        generator = torch.Generator().manual_seed(length)
        made = [
            torch.randn((1, count, length, size), generator=generator, dtype=torch.bfloat16)
            for count, size in ((query_heads, width), (key_heads, width), (key_heads, value_width))
        ]
        weights = torch.randn((1, length, query_heads, value_width), generator=generator)
        found = []
        for device in ("cpu", "cuda"):
            rows = [tensor.to(device).requires_grad_() for tensor in made]
            layer, probe = nn.Module(), LogitProbe(1, query_heads, device)
            layer.layer_idx = 0  # type: ignore[assignment]
            output, _ = tree_attention(
                layer, *rows, None, tree=Tree(end).to(torch.device(device)), probe=probe
            )
            grads = torch.autograd.grad((output * weights.to(device)).sum(), rows)
            found.append([tensor.cpu().float() for tensor in (output, probe.take(), *grads)])
        for ours, theirs in zip(*found, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 0.01, length


@on_cuda
def test_a_gpu_compiles_no_more_for_new_lengths() -> None:
    heads = SHAPES["grouped"]
    counts = torch._dynamo.utils.counters["stats"]

    def run(length: int, learns: bool) -> None:
        tree = Tree(torch.full((length,), length), "cuda")
        rows = [
            torch.randn(1, count, length, size, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for count, size in ((heads[0], heads[2]), (heads[1], heads[2]), (heads[1], heads[3]))
        ]
        with torch.set_grad_enabled(learns):
            output, _ = tree_attention(nn.Module(), *rows, None, tree=tree)
        if learns:
            output.sum().backward()

    for learns in (True, False):
        run(900, learns)
        compiled = counts["unique_graphs"]
        for length in (30, 1280, 1290, 8192, 64 * 128, 4 * 128, 12 * 128, 3000):
            run(length, learns)
        assert counts["unique_graphs"] - compiled <= 1, "one more where a number of blocks was another size"


@on_cuda
def test_a_gpu_computes_a_layer_again() -> None:
    """As activation checkpointing does, with the trial inside of what it records."""
    tree = Tree(torch.full((500,), 500), "cuda")
    rows = [
        torch.randn(1, count, 500, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for count in (9, 3, 3)
    ]
    flex_tree.fits.cache_clear()

    def layer(*rows: Tensor) -> Tensor:
        return tree_attention(nn.Module(), *rows, None, tree=tree)[0]

    grads = [
        torch.autograd.grad(output.float().square().sum(), rows)
        for output in (checkpoint(layer, *rows, use_reentrant=False), layer(*rows))
    ]
    for again, once in zip(*grads, strict=True):
        assert float((again - once).norm() / once.norm()) < 1e-3
