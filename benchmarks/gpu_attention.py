"""Of `gpu.py`: attention along a prefix tree, with the probe of QK-Clip and without, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_bench import Bench, relative
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from k2rl.models.logit_probe import LogitProbe
from k2rl.training.tree_attention import (
    CPU_BLOCK,
    CUDA_BLOCK,
    QueryBlock,
    block_size,
    plan_blocks,
    tree_attention,
)

HEADS, KEY_HEADS, WIDTH = 16, 4, 128
BLOCKS = (CPU_BLOCK, 256, 1024, CUDA_BLOCK)


@dataclass(frozen=True)
class Row:
    """A packed row: query i sees key j iff `j <= i < subtree_end[j]`."""

    name: str
    subtree_end: Tensor

    def blocks(self, size: int, device: torch.device) -> tuple[QueryBlock, ...]:
        planned = plan_blocks(self.subtree_end, size)
        return tuple(replace(block, mask=block.mask.to(device)) for block in planned)

    def visible(self, device: torch.device) -> Tensor:
        """[T, T] bool."""
        end = self.subtree_end.to(device)
        position = torch.arange(len(end), device=device)
        return (position[None, :] <= position[:, None]) & (position[:, None] < end[None, :])

    def flex_mask(self, device: torch.device) -> BlockMask:
        """The same for flex_attention."""
        end, length = self.subtree_end.to(device), len(self.subtree_end)

        def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i < end[j])

        return create_block_mask(sees, None, None, length, length, device=str(device))

    @property
    def pairs(self) -> int:
        """That see each other."""
        return int((self.subtree_end - torch.arange(len(self.subtree_end))).sum())


def rows(length: int) -> list[Row]:
    part = length // 8
    position = torch.arange(length)
    ends = ((position // part + 1) * part).clamp(max=length)
    return [
        Row(f"one sequence of {length}", torch.full((length,), length)),
        Row(f"8 sequences in {length}", ends),
        Row(f"a prompt with 7 answers in {length}", torch.where(position < part, length, ends)),
    ]


class Problem:
    """Queries, keys and values [1, heads, T, d], and a layer that the probe knows."""

    def __init__(self, bench: Bench, length: int, learns: bool = True) -> None:
        shapes = [(1, heads, length, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        made = [bench.random(*shape, dtype=torch.bfloat16) for shape in shapes]
        self.query, self.key, self.value = (tensor.requires_grad_(learns) for tensor in made)
        self.weights = bench.random(1, length, HEADS, WIDTH, dtype=torch.bfloat16)
        self.layer, self.probe = nn.Module(), LogitProbe(1, HEADS, bench.device)
        self.layer.layer_idx = 0

    def run(self, attend: Callable[[], Tensor], backward: bool) -> Tensor:
        self.query.grad = self.key.grad = self.value.grad = None
        output = attend()
        if backward and output.requires_grad:
            output.backward(self.weights)
        return output

    def tree(self, blocks: tuple[QueryBlock, ...], probed: bool, precision: str = "highest") -> Tensor:
        """`precision`, of products of float32, also holds in the backward pass that follows."""
        torch.set_float32_matmul_precision(precision)
        return tree_attention(
            *(self.layer, self.query, self.key, self.value, None),
            tree=blocks,
            probe=self.probe if probed else None,
        )[0]

    def flex(self, fused: Callable[..., Any], mask: BlockMask, probed: bool) -> Tensor:
        heads = (self.query, self.key, self.value)
        if not probed:
            return fused(*heads, block_mask=mask, enable_gqa=True).transpose(1, 2)
        from torch.nn.attention.flex_attention import AuxRequest  # newer than the rest

        output, aux = fused(*heads, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(max_scores=True))
        self.probe.record(self.layer, aux.max_scores[0].detach().amax(dim=1))
        return output.transpose(1, 2)

    def sdpa(self, mask: Tensor | None) -> Tensor:
        """As transformers calls it: its kernels take fewer heads of keys without a mask alone."""
        key, value = self.key, self.value
        if mask is not None:
            key, value = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (key, value))
        output = F.scaled_dot_product_attention(
            self.query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None
        )
        return output.transpose(1, 2)

    @torch.no_grad()
    def naive_maxima(self, visible: Tensor) -> Tensor:
        """[heads] float32, from the whole matrix of logits."""
        torch.set_float32_matmul_precision("highest")
        keys = self.key[0].float().repeat_interleave(HEADS // KEY_HEADS, dim=0)
        logits = torch.bmm(self.query[0].float() * WIDTH**-0.5, keys.mT)
        return logits.masked_fill_(~visible, -torch.inf).amax(dim=(1, 2))

    def gradients(self) -> list[Tensor]:
        grads = (tensor.grad for tensor in (self.query, self.key, self.value))
        return [grad.clone() for grad in grads if grad is not None]


def _report(
    bench: Bench,
    part: str,
    row: Row,
    problem: Problem,
    attends: dict[str, Callable[[], Tensor]],
    beside: str,
) -> None:
    """Forward, and forward with backward, of each; beside one of them."""
    forward = bench.in_turns({name: partial(problem.run, one, False) for name, one in attends.items()})
    both = bench.in_turns({name: partial(problem.run, one, True) for name, one in attends.items()})
    product = 2.0 * row.pairs * HEADS * WIDTH
    for name, one in attends.items():
        bench.free()
        bench.row(
            part,
            f"{row.name}, {name}",
            {
                "forward ms": forward[name] * 1e3,
                "with backward ms": both[name] * 1e3,
                f"forward / {beside}": forward[name] / forward[beside],
                f"with backward / {beside}": both[name] / both[beside],
                "peak GiB": bench.peak(partial(problem.run, one, True)),
                "forward TFLOP/s": 2 * product / forward[name] / 1e12,
                "with backward TFLOP/s": 7 * product / both[name] / 1e12,
            },
        )


def probe(bench: Bench) -> None:
    length = 128 if bench.small else 8192
    _numerics(bench, 64 if bench.small else 1024)
    problem = Problem(bench, length)
    for row in rows(length):
        attends: dict[str, Callable[[], Tensor]] = {}
        for size in BLOCKS:
            blocks = row.blocks(size, bench.device)
            attends[f"k2rl, blocks of {size}, probe off"] = partial(problem.tree, blocks, False)
            attends[f"k2rl, blocks of {size}, probe on"] = partial(problem.tree, blocks, True)
        attends[f"k2rl, blocks of {size}, probe on, TF32"] = partial(problem.tree, blocks, True, "high")
        alone = row.name.startswith("one")
        beside = "SDPA" if alone else "SDPA with a dense mask"
        attends[beside] = partial(problem.sdpa, None if alone else row.visible(bench.device))
        _report(bench, "probe", row, problem, attends, beside)
        if alone:
            naive = partial(problem.naive_maxima, row.visible(bench.device))
            figures = {"forward ms": bench.in_turns({"": naive})[""] * 1e3, "peak GiB": bench.peak(naive)}
            bench.row("probe", f"{row.name}, the whole matrix of logits", figures)
        del attends
        bench.free()


def _numerics(bench: Bench, length: int) -> None:
    """The probe's beside those of the whole matrix, and outputs and gradients beside a dense mask's."""
    problem = Problem(bench, length)
    for row in rows(length):
        visible = row.visible(bench.device)
        blocks = row.blocks(block_size(bench.device), bench.device)
        expected = problem.naive_maxima(visible)
        dense = problem.run(partial(problem.sdpa, visible), True)
        theirs = problem.gradients()
        for precision in ("highest", "high") if bench.on_cuda else ("highest",):
            output = problem.run(partial(problem.tree, blocks, True, precision), True)
            bench.row(
                "probe",
                f"{row.name}, {'TF32' if precision == 'high' else 'float32'}, against a dense mask",
                {
                    "largest logits off by": relative(problem.probe.take()[0], expected),
                    "output": relative(output, dense),
                    "gradients": max(map(relative, problem.gradients(), theirs)),
                },
            )


def flex(bench: Bench) -> None:
    """torch's flex_attention under the same trees, which gives each query's largest logit on request.

    On a CPU it gives none, and has no backward pass.
    """
    length = 128 if bench.small else 8192
    problem = Problem(bench, length, learns=bench.on_cuda)
    fused = torch.compile(flex_attention, dynamic=False) if bench.on_cuda else flex_attention
    for row in rows(length):
        blocks, mask = row.blocks(CUDA_BLOCK, bench.device), row.flex_mask(bench.device)
        beside = f"k2rl, blocks of {CUDA_BLOCK}, probe on"
        attends = {
            beside: partial(problem.tree, blocks, True),
            "flex_attention": partial(problem.flex, fused, mask, False),
        }
        if bench.on_cuda:
            attends["flex_attention with max_scores"] = partial(problem.flex, fused, mask, True)
        _report(bench, "flex", row, problem, attends, beside)
        _flex_numerics(bench, row, problem, partial(problem.flex, fused, mask, bench.on_cuda))
        del attends
        bench.free()
    # Last, whether one compiled kernel takes rows of any length, as micro-batches are.
    fused = torch.compile(flex_attention, dynamic=True) if bench.on_cuda else flex_attention
    for length in (100, 77) if bench.small else (8192, 5000, 777, 6001):
        problem, row = Problem(bench, length, learns=bench.on_cuda), rows(length)[-1]
        attend = partial(problem.flex, fused, row.flex_mask(bench.device), bench.on_cuda)
        _flex_numerics(bench, row, problem, attend)


def _flex_numerics(bench: Bench, row: Row, problem: Problem, attend: Callable[[], Tensor]) -> None:
    problem.probe.take()
    ours = problem.run(partial(problem.tree, row.blocks(CUDA_BLOCK, bench.device), True), True)
    our_gradients, expected = problem.gradients(), problem.probe.take()[0]
    theirs = problem.run(attend, True)
    found = problem.probe.take()[0] if bench.on_cuda else expected
    bench.row(
        "flex",
        f"{row.name}, flex_attention against k2rl",
        {
            "largest logits off by": relative(found, expected),
            "output": relative(theirs, ours),
            "gradients": max(map(relative, problem.gradients(), our_gradients), default=0.0),
            "ms": bench.seconds(partial(problem.run, attend, True)) * 1e3,
        },
    )
