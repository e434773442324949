"""Of `gpu.py`: attention along a prefix tree, with the probe of QK-Clip and without, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_bench import Bench, relative
from torch import Tensor, nn

from k2rl.models.logit_probe import LogitProbe
from k2rl.training import flex_tree
from k2rl.training.tree_attention import Tree, tree_attention

HEADS, KEY_HEADS, WIDTH = 16, 4, 128


@contextmanager
def by_blocks() -> Iterator[None]:
    """As where flex_attention is not to be had."""
    with patch.object(flex_tree, "fits", lambda heads: False):
        yield


@dataclass(frozen=True)
class Row:
    """A packed row: query i sees key j iff `j <= i < subtree_end[j]`."""

    name: str
    subtree_end: Tensor

    def tree(self, device: torch.device) -> Tree:
        return Tree(self.subtree_end, device)

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
    ends = ((position // part + 1) * part).clamp(max=length)
    return [
        Row(f"one sequence of {length}", torch.full((length,), length)),
        Row(f"8 sequences in {length}", ends),
        Row(f"a prompt with 7 answers in {length}", torch.where(position < part, length, ends)),
    ]


class Problem:
    """Queries, keys and values [1, heads, T, d], and a layer that the probe knows."""

    def __init__(
        self, bench: Bench, length: int, heads: tuple[int, int, int] = (HEADS, KEY_HEADS, WIDTH)
    ) -> None:
        """`heads`: of queries, of keys, and their width."""
        self.heads, self.key_heads, self.width = heads
        shapes = [(1, count, length, self.width) for count in (self.heads, self.key_heads, self.key_heads)]
        made = [bench.random(*shape, dtype=torch.bfloat16) for shape in shapes]
        self.query, self.key, self.value = (tensor.requires_grad_() for tensor in made)
        self.weights = bench.random(1, length, self.heads, self.width, dtype=torch.bfloat16)
        self.layer, self.probe = nn.Module(), LogitProbe(1, self.heads, bench.device)
        self.layer.layer_idx = 0

    def run(self, attend: Callable[[], Tensor], backward: bool) -> Tensor:
        self.query.grad = self.key.grad = self.value.grad = None
        output = attend()
        if backward:
            output.backward(self.weights)
        return output

    def tree(self, tree: Tree, probed: bool = True) -> Tensor:
        return tree_attention(
            *(self.layer, self.query, self.key, self.value, None),
            tree=tree,
            probe=self.probe if probed else None,
        )[0]

    def tree_by_blocks(self, tree: Tree) -> Tensor:
        with by_blocks():
            return self.tree(tree)

    def sdpa(self, mask: Tensor | None) -> Tensor:
        """As transformers calls it: its kernels take fewer heads of keys without a mask alone."""
        key, value = self.key, self.value
        if mask is not None:
            times = self.heads // self.key_heads
            key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
        output = F.scaled_dot_product_attention(
            self.query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=mask is None
        )
        return output.transpose(1, 2)

    @torch.no_grad()
    def naive_maxima(self, visible: Tensor) -> Tensor:
        """[heads] float32, from the whole matrix of logits."""
        keys = self.key[0].float().repeat_interleave(self.heads // self.key_heads, dim=0)
        logits = torch.bmm(self.query[0].float() * self.width**-0.5, keys.mT)
        return logits.masked_fill_(~visible, -torch.inf).amax(dim=(1, 2))

    def gradients(self) -> list[Tensor]:
        grads = (tensor.grad for tensor in (self.query, self.key, self.value))
        return [grad.clone() for grad in grads if grad is not None]


def probe(bench: Bench) -> None:
    """What k2rl takes for a row; the same block by block; and SDPA, which has no probe."""
    _numerics(bench)
    length = 128 if bench.small else 8192
    problem = Problem(bench, length)
    for row in rows(length):
        tree, alone = row.tree(bench.device), row.name.startswith("one")
        visible = row.visible(bench.device)
        sdpa = "SDPA" if alone else "SDPA with a dense mask"
        attends = {
            "k2rl, probe off": partial(problem.tree, tree, False),
            "k2rl": partial(problem.tree, tree),
            "k2rl, by blocks": partial(problem.tree_by_blocks, tree),
            sdpa: partial(problem.sdpa, None if alone else visible),
        }
        _report(bench, row, problem, attends, sdpa)
        if alone:
            naive = partial(problem.naive_maxima, visible)
            figures = {"forward ms": bench.in_turns({"": naive})[""] * 1e3, "peak GiB": bench.peak(naive)}
            bench.row("probe", f"{row.name}, the whole matrix of logits", figures)
        made = bench.in_turns({"": lambda row=row: row.tree(bench.device).mask})[""]
        bench.row("probe", f"{row.name}, the mask of a row, once for all layers", {"ms": made * 1e3})
        del attends, visible, tree
        bench.free()


def _report(
    bench: Bench, row: Row, problem: Problem, attends: dict[str, Callable[[], Tensor]], beside: str
) -> None:
    """Forward, and forward with backward, of each; beside one of them."""
    forward = bench.in_turns({name: partial(problem.run, one, False) for name, one in attends.items()})
    both = bench.in_turns({name: partial(problem.run, one, True) for name, one in attends.items()})
    product = 2.0 * row.pairs * problem.heads * problem.width
    for name, one in attends.items():
        bench.free()
        bench.row(
            "probe",
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


def _numerics(bench: Bench) -> None:
    """Largest logits beside those of the whole matrix, outputs and gradients beside a dense mask's.

    In rows of several lengths, as micro-batches are: the kernel is compiled once for all.
    """
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    cases = [(row, size) for size in ((64,) if bench.small else (1024,)) for row in rows(size)]
    cases += [(rows(size)[-1], size) for size in ((77,) if bench.small else (777, 3001, 2048, 5000))]
    for row, length in cases:
        problem = Problem(bench, length)
        visible, tree = row.visible(bench.device), row.tree(bench.device)
        expected = problem.naive_maxima(visible)
        dense = problem.run(partial(problem.sdpa, visible), True)
        theirs = problem.gradients()
        for name, attend in (("k2rl", problem.tree), ("k2rl, by blocks", problem.tree_by_blocks)):
            problem.probe.take()
            output = problem.run(partial(attend, tree), True)
            bench.row(
                "probe",
                f"{row.name}, {name} against a dense mask",
                {
                    "largest logits off by": relative(problem.probe.take()[0], expected),
                    "output": relative(output, dense),
                    "gradients": max(map(relative, problem.gradients(), theirs)),
                },
            )
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    bench.row("probe", f"{len({size for _, size in cases})} lengths of rows", {"kernels compiled": compiled})
