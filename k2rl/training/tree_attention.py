"""Attention along a prefix tree: each position sees its ancestors, and only they are computed.

A row of packed sequences is a tree in depth-first order. A dense mask over it would cost the square of
the row's length, most of it for pairs that do not see each other. Here queries go in blocks, and each
block meets only the keys that any of its queries sees: a few contiguous runs (its own branch, the prompt
above it). The cost is that of the sequences' own attention, however many groups share the row.

On a GPU torch's flex_attention does the same in one kernel (`flex_tree.py`), where it can.

Registered with transformers as the attention `k2rl_tree`; the tree travels as the model's keyword argument
`tree`. Without one it is transformers' own `sdpa`. Another argument, `probe`, is told the largest logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from k2rl.models.logit_probe import LogitProbe
from k2rl.training import flex_tree

NAME = "k2rl_tree"
CPU_BLOCK = 96
"""Queries in a block: fewer see fewer foreign keys, more make larger matrix products."""
CUDA_BLOCK = 512
"""On a GPU without flex_attention: each block is some thirty launches, however small."""


@dataclass(frozen=True)
class QueryBlock:
    """Queries `[start, stop)` of a row with the keys that at least one of them sees."""

    start: int
    stop: int
    #: Contiguous runs `[first, last)` of those keys, ascending.
    key_runs: tuple[tuple[int, int], ...]
    #: [stop - start, keys] float32, 0 where the query sees the key and -inf where it does not.
    mask: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """The block's keys out of [heads, T, d]."""
        runs = [rows[:, first:last] for first, last in self.key_runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)

    def give_back(self, total: Tensor, part: Tensor) -> None:
        """Add what belongs to the block's keys to [heads, T, d]; the reverse of `take`."""
        offset = 0
        for first, last in self.key_runs:
            total[:, first:last] += part[:, offset : offset + last - first]
            offset += last - first


def block_size(device: torch.device) -> int:
    """Queries in a block that suit a device."""
    return CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK


def plan_blocks(subtree_end: Tensor, size: int = CPU_BLOCK) -> tuple[QueryBlock, ...]:
    """Cut a row into query blocks.

    Args:
        subtree_end: [T] int64, one past the last position of each position's subtree in depth-first
            order: query i sees key j iff `j <= i < subtree_end[j]`.
        size: queries in a block.
    """
    position = torch.arange(len(subtree_end))
    blocks = []
    for start in range(0, len(subtree_end), size):
        stop = min(start + size, len(subtree_end))
        query = position[start:stop, None]
        visible = (position[:stop] <= query) & (query < subtree_end[:stop])
        keys = visible.any(dim=0).nonzero()[:, 0]
        gaps = (keys.diff() > 1).nonzero()[:, 0] + 1
        runs = tuple((int(run[0]), int(run[-1]) + 1) for run in keys.tensor_split(gaps.tolist()))
        mask = torch.zeros(stop - start, len(keys)).masked_fill_(~visible[:, keys], -torch.inf)
        blocks.append(QueryBlock(start, stop, runs, mask))
    return tuple(blocks)


class Tree:
    """What each position of a row sees, in the form that the attention on its device takes.

    Made when it is first asked for, and kept: all layers and passes read one.
    """

    def __init__(self, subtree_end: Tensor, device: torch.device | str = "cpu") -> None:
        """Args:
        subtree_end: [T] int64, on the CPU; see `plan_blocks`.
        device: of the attention.
        """
        self.subtree_end = subtree_end
        self.device = torch.device(device)

    @cached_property
    def blocks(self) -> tuple[QueryBlock, ...]:
        """For attention block by block."""
        planned = plan_blocks(self.subtree_end, block_size(self.device))
        return tuple(replace(block, mask=block.mask.to(self.device)) for block in planned)

    @cached_property
    def mask(self) -> BlockMask:
        """For flex_attention."""
        return flex_tree.tree_mask(self.subtree_end.to(self.device))

    def to(self, device: torch.device) -> Tree:
        return Tree(self.subtree_end, device)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Tree | None = None,
    probe: LogitProbe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; grouped-query attention included.

    Args:
        module: the attention layer.
        query: [1, H, T, d].
        key: [1, H / G, T, d].
        value: [1, H / G, T, d_v].
        attention_mask: ignored where `tree` is given.
        scaling: of the scores; default `d ** -0.5`.
        tree: the row's.
        probe: told the largest logit of each head; with `tree` only.
        kwargs: passed on where `tree` is not given.

    Returns:
        [1, T, H, d_v] in the query's dtype (scores and softmax are float32), and no weights.
    """
    if tree is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return plain
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Tensor
    if flex_tree.fits(flex_tree.Heads.of(query, key, value)):
        output, maxima = flex_tree.attend(query, key, value, scale, tree.mask, probe is not None)
        if probe and maxima is not None:
            probe.record(module, maxima)
        return output, None
    record = partial(probe.record, module) if probe else None
    output = _TreeAttention.apply(query, key, value, scale, tree.blocks, record)  # type: ignore[no-untyped-call]
    return output, None


class _TreeAttention(torch.autograd.Function):
    """Block by block; the backward pass computes each block's probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        tree: tuple[QueryBlock, ...],
        record: Callable[[Tensor], None] | None,
    ) -> Tensor:
        queries, keys, values = _by_key_head(query, key), key[0].float(), value[0].float()
        output = query.new_empty(query.shape[2], *queries.shape[:2], value.shape[-1])  # [T, heads, G, d_v]
        for block in tree:
            logits = _logits(_rows(queries, block, scale), block.take(keys), block.mask)
            if record:
                record(logits.amax(dim=-1).unflatten(1, (queries.shape[1], -1)).amax(dim=-1).flatten())
            result = torch.bmm(torch.softmax(logits, dim=-1), block.take(values))
            output[block.start : block.stop] = result.unflatten(1, (queries.shape[1], -1)).permute(2, 0, 1, 3)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale, ctx.tree = scale, tree
        return output.flatten(1, 2)[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        queries, keys, values = _by_key_head(query, key), key[0].float(), value[0].float()
        grad_output = grads[0][0].view_as(output)
        # Softmax's backward subtracts sum(probs * grad_probs), which equals sum(output * grad_output).
        inner = (output.float() * grad_output.float()).sum(dim=-1, keepdim=True).permute(1, 2, 0, 3)
        grad_output = grad_output.permute(1, 2, 0, 3)
        grad_query = torch.empty_like(query)
        grad_queries = _by_key_head(grad_query, key)
        grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
        for block in ctx.tree:
            rows, block_keys = _rows(queries, block, ctx.scale), block.take(keys)
            grad = _rows(grad_output, block)
            probs = torch.softmax(_logits(rows, block_keys, block.mask), dim=-1)
            grad_scores = torch.bmm(grad, block.take(values).mT).sub_(_rows(inner, block)).mul_(probs)
            grad_rows = torch.bmm(grad_scores, block_keys).mul_(ctx.scale)
            grad_queries[:, :, block.start : block.stop] = grad_rows.unflatten(1, (queries.shape[1], -1))
            block.give_back(grad_key, torch.bmm(grad_scores.mT, rows))
            block.give_back(grad_value, torch.bmm(probs.mT, grad))
        return grad_query, grad_key.to(key.dtype)[None], grad_value.to(value.dtype)[None], None, None, None


def _by_key_head(query: Tensor, key: Tensor) -> Tensor:
    """[1, H, T, d] as a view [key heads, G, T, d]: the G query heads of each key head side by side."""
    view: Tensor = query[0].unflatten(0, (key.shape[1], -1))
    return view


def _rows(queries: Tensor, block: QueryBlock, scale: float = 1.0) -> Tensor:
    """A block of [heads, G, T, d] as [heads, G * block, d] float32."""
    rows = queries[:, :, block.start : block.stop].flatten(1, 2).float()
    return rows if scale == 1.0 else rows * scale


def _logits(rows: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """[heads, G * block, keys] float32, -inf where a query does not see a key."""
    scores = torch.bmm(rows, keys.mT)
    scores.unflatten(1, (-1, mask.shape[0])).add_(mask)
    return scores


AttentionInterface.register(NAME, tree_attention)
