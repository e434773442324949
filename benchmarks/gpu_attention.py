"""Of `gpu.py`: attention along a prefix tree, with the probe of QK-Clip and without, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from gpu_bench import Bench, relative
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from k2rl.models.logit_probe import LogitProbe
from k2rl.training.tree_attention import BLOCK, QueryBlock, plan_blocks, tree_attention

HEADS, KEY_HEADS, WIDTH = 16, 4, 128
BLOCKS = (BLOCK, 256, 512, 1024)


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

    @property
    def pairs(self) -> int:
        """That see each other."""
        return int((self.subtree_end - torch.arange(len(self.subtree_end))).sum())


def rows(length: int) -> list[Row]:
    part = length // 8
    position = torch.arange(length)
    ends = (position // part + 1) * part
    return [
        Row(f"one sequence of {length}", torch.full((length,), length)),
        Row(f"8 sequences of {part}", ends),
        Row(f"a prompt of {part} with 7 answers", torch.where(position < part, length, ends)),
    ]


class Problem:
    """Queries, keys and values [1, heads, T, d], and a layer that the probe knows."""

    def __init__(self, bench: Bench, length: int) -> None:
        shapes = [(1, heads, length, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        made = [bench.random(*shape, dtype=torch.bfloat16) for shape in shapes]
        self.query, self.key, self.value = (tensor.requires_grad_() for tensor in made)
        self.weights = bench.random(1, length, HEADS, WIDTH, dtype=torch.bfloat16)
        self.layer, self.probe = nn.Module(), LogitProbe(1, HEADS, bench.device)
        self.layer.layer_idx = 0

    def run(self, attend: Callable[[], Tensor], backward: bool) -> Tensor:
        self.query.grad = self.key.grad = self.value.grad = None
        if not backward:
            with torch.no_grad():
                return attend()
        output = attend()
        (output * self.weights).sum().backward()
        return output

    def tree(self, blocks: tuple[QueryBlock, ...], probed: bool) -> Tensor:
        return tree_attention(
            *(self.layer, self.query, self.key, self.value, None),
            tree=blocks,
            probe=self.probe if probed else None,
        )[0]

    def sdpa(self, mask: Tensor | None) -> Tensor:
        output = F.scaled_dot_product_attention(
            *(self.query, self.key, self.value), attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return output.transpose(1, 2)

    def naive_maxima(self, visible: Tensor) -> Tensor:
        """[heads] float32, from the whole matrix of logits."""
        keys = self.key[0].float().repeat_interleave(HEADS // KEY_HEADS, dim=0)
        logits = torch.bmm(self.query[0].float() * WIDTH**-0.5, keys.mT)
        return logits.masked_fill_(~visible, -torch.inf).amax(dim=(1, 2))

    def gradients(self) -> list[Tensor]:
        return [tensor.grad.clone() for tensor in (self.query, self.key, self.value)]


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
    _largest_logits(bench, 64 if bench.small else 1024)
    problem = Problem(bench, length)
    for row in rows(length):
        attends: dict[str, Callable[[], Tensor]] = {}
        for size in BLOCKS if row.name.startswith("one") else BLOCKS[:-1]:
            blocks = row.blocks(size, bench.device)
            for probed in (False, True):
                name = f"k2rl, blocks of {size}, probe {'on' if probed else 'off'}"
                attends[name] = partial(problem.tree, blocks, probed)
        alone = row.name.startswith("one")
        beside = "SDPA" if alone else "SDPA with a dense mask"
        attends[beside] = partial(problem.sdpa, None if alone else row.visible(bench.device))
        _report(bench, "probe", row, problem, attends, beside)
        if alone:
            visible = row.visible(bench.device)
            naive = partial(problem.run, lambda visible=visible: problem.naive_maxima(visible), False)
            bench.row(
                "probe",
                f"{row.name}, the whole matrix of logits",
                {
                    "forward ms": bench.in_turns({"naive": naive})["naive"] * 1e3,
                    "peak GiB": bench.peak(naive),
                },
            )
        del attends
        bench.free()


def _largest_logits(bench: Bench, length: int) -> None:
    """The probe's beside those of the whole matrix, and outputs and gradients beside a dense mask's."""
    problem = Problem(bench, length)
    for row in rows(length):
        visible = row.visible(bench.device)
        output = problem.run(partial(problem.tree, row.blocks(BLOCK, bench.device), True), True)
        ours, found = problem.gradients(), problem.probe.take()[0]
        dense = problem.run(partial(problem.sdpa, visible), True)
        theirs, expected = problem.gradients(), problem.naive_maxima(visible).detach()
        bench.row(
            "probe",
            f"{row.name}, against a dense mask",
            {
                "largest logits off by": relative(found, expected),
                "output": relative(output, dense),
                "gradients": max(relative(a, b) for a, b in zip(ours, theirs, strict=True)),
            },
        )


def flex(bench: Bench) -> None:
    """torch's flex_attention under the same trees, which gives each query's largest logit on request."""
    length = 128 if bench.small else 8192
    problem = Problem(bench, length)
    # On a CPU flex_attention compiles for inference alone.
    fused = torch.compile(flex_attention, dynamic=False) if bench.on_cuda else flex_attention

    def attend(mask: BlockMask, probed: bool) -> Tensor:
        heads = (problem.query, problem.key, problem.value)
        if not probed:
            return fused(*heads, block_mask=mask, enable_gqa=True).transpose(1, 2)
        output, aux = fused(*heads, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(max_scores=True))
        problem.probe.record(problem.layer, aux.max_scores[0].detach().amax(dim=1))
        return output.transpose(1, 2)

    for row in rows(length):
        end = row.subtree_end.to(bench.device)

        def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor, end: Tensor = end) -> Tensor:
            return (j <= i) & (i < end[j])

        mask = create_block_mask(sees, None, None, length, length, device=bench.device)
        blocks = row.blocks(512, bench.device)
        _report(
            bench,
            "flex",
            row,
            problem,
            {
                "k2rl, blocks of 512, probe on": partial(problem.tree, blocks, True),
                "flex_attention": partial(attend, mask, False),
                "flex_attention with max_scores": partial(attend, mask, True),
            },
            "k2rl, blocks of 512, probe on",
        )
        problem.probe.take()
        ours = problem.run(partial(problem.tree, blocks, True), True)
        our_gradients, expected = problem.gradients(), problem.probe.take()[0]
        theirs = problem.run(partial(attend, mask, True), True)
        bench.row(
            "flex",
            f"{row.name}, flex_attention against k2rl",
            {
                "largest logits off by": relative(problem.probe.take()[0], expected),
                "output": relative(theirs, ours),
                "gradients": max(
                    relative(a, b) for a, b in zip(problem.gradients(), our_gradients, strict=True)
                ),
            },
        )
