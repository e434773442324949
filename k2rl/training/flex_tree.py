"""Attention along a prefix tree by torch's flex_attention: one kernel for a row, compiled, on a GPU.

It skips blocks of queries and keys that do not see each other, and tells the largest logit of each query.
Rows are padded to whole blocks, of a number that the kernel takes as a variable: it is compiled once, not
for each length.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

logger = logging.getLogger(__name__)

BLOCK = 128
"""Queries, and keys, in a block of the mask: what the kernels are made for."""
MIN_BLOCKS = 2
"""In a row: of one, a kernel would be compiled that takes no more, and of less, another kind of kernel."""
MAX_KERNELS = 64
"""That torch may compile of one function, some for each kind of heads; by its own limit it stops at eight."""
TOLERANCE = 0.02
"""By which the kernel's figures for a trial row may be off, relative: several times bfloat16's rounding."""


class Heads(NamedTuple):
    """Of an attention layer: what decides which kernel it needs."""

    device: torch.device
    dtype: torch.dtype
    queries: int
    keys: int
    width: int
    value_width: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Heads:
        """From [1, H, T, d], [1, H / G, T, d] and [1, H / G, T, d_v]."""
        sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        return cls(query.device, query.dtype, *sizes)


def tree_mask(subtree_end: Tensor, block: int = BLOCK) -> BlockMask:
    """What each position of a row sees, by blocks; made of tables of blocks alone, on the row's device.

    Args:
        subtree_end: [T] int64: query i sees key j iff `j <= i < subtree_end[j]`.
        block: positions in a block.

    Returns:
        Of T padded to whole blocks, `MIN_BLOCKS` at least; padding sees itself alone.
    """
    length, device = len(subtree_end), subtree_end.device
    blocks = max(MIN_BLOCKS, -(-length // block))
    end = torch.arange(1, blocks * block + 1, device=device)
    end[:length] = subtree_end
    ends = end.view(blocks, block)
    first = torch.arange(blocks, device=device) * block
    earlier = first[None, :] < first[:, None]
    # [blocks of queries, blocks of keys]: a later query sees a key if the key's subtree reaches as far.
    every = earlier & (ends.amin(dim=1)[None, :] >= first[:, None] + block)
    some = earlier & (ends.amax(dim=1)[None, :] > first[:, None]) & ~every
    some.fill_diagonal_(True)

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    length = blocks * block
    return BlockMask.from_kv_blocks(
        *_table(some),
        *_table(every),
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(length, length),
    )


def _table(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of [blocks, blocks] bool: how many each row wants, and which, those first; [1, 1, ...] int32."""
    order = torch.argsort(wanted.to(torch.int32), dim=1, descending=True, stable=True)
    return wanted.sum(dim=1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: BlockMask, probed: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention of a row.

    Args:
        query: [1, H, T, d].
        key: [1, H / G, T, d].
        value: [1, H / G, T, d_v].
        scale: of the scores.
        mask: from `tree_mask`.
        probed: whether to tell the largest logits, which only a GPU can.

    Returns:
        [1, T, H, d_v] in the query's dtype, and the heads' largest logits, [H] float32 without gradient.
    """
    length = query.shape[2]
    padding = mask.shape[-1] - length
    rows = (_in_blocks(query, padding), _in_blocks(key, padding), _in_blocks(value, padding))
    # As text: of a number, the kernel would make a variable.
    run = _compiled(_attend_and_tell if probed else _attend) if query.is_cuda else _attend
    output, maxima = run(*rows, mask, repr(scale))
    if maxima is not None:
        maxima = maxima.detach()[0, :, :length].amax(dim=1)
    return output[:, :, :length].transpose(1, 2), maxima


def _in_blocks(tensor: Tensor, padding: int) -> Tensor:
    """[1, heads, T, d] as [1, heads, blocks, BLOCK, d], so that its length is whole blocks by its shape."""
    padded = F.pad(tensor, (0, 0, 0, padding)) if padding else tensor
    return padded.unflatten(2, (-1, BLOCK))  # type: ignore[no-any-return]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: str
) -> tuple[Tensor, Tensor | None]:
    query, key, value = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
    return flex_attention(query, key, value, block_mask=mask, scale=float(scale), enable_gqa=True), None


def _attend_and_tell(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: str
) -> tuple[Tensor, Tensor | None]:
    query, key, value = query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
    told = AuxRequest(max_scores=True)
    output, aux = flex_attention(
        query, key, value, block_mask=mask, scale=float(scale), enable_gqa=True, return_aux=told
    )
    return output, aux.max_scores


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel for all lengths. What torch would rather not compile fails: uncompiled it takes T^2."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_KERNELS)
    return torch.compile(function, dynamic=True, fullgraph=True)


@cache
def fits(heads: Heads) -> bool:
    """Whether this attention is to be used; decided once for heads of a kind, and a refusal told once.

    On a GPU with Triton, a short row is computed forward and backward beside a dense mask.
    """
    if heads.device.type != "cuda":
        return False
    reason = "torch needs Triton for it" if importlib.util.find_spec("triton") is None else _trial(heads)
    if reason:
        logger.warning(
            "flex_attention is not used for %d query heads of %d on %d key heads (values of %d) in %s; "
            "attention goes block by block, which is slower: %s",
            *(heads.queries, heads.width, heads.keys, heads.value_width, heads.dtype, reason),
        )
    return not reason


def _trial(heads: Heads) -> str | None:
    """What is wrong with it, in a few words.

    Made apart from what the caller records for a backward pass.
    """
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept),
        torch.enable_grad(),
    ):
        try:
            gap = _gap(heads)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, ValueError) as error:
            told = str(error).strip().splitlines()
            return f"{type(error).__name__}: {told[0]}" if told else repr(error)
    return None if gap <= TOLERANCE else f"a trial row is off by {gap:.2g}"


def _gap(heads: Heads) -> float:
    """The largest relative error of outputs, largest logits and gradients in a row with two branches."""
    # A number of blocks that is no other size: those would be taken for the same variable.
    blocks = next(n for n in range(MIN_BLOCKS, 9) if n not in heads)
    length = blocks * BLOCK - 28
    end = torch.full((length,), length, device=heads.device)
    end[length // 4 : length // 2] = length // 2
    position = torch.arange(length, device=heads.device)
    visible = (position[None, :] <= position[:, None]) & (position[:, None] < end[None, :])
    seeded = torch.Generator(heads.device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=seeded, dtype=dtype, device=heads.device)

    query = random(1, heads.queries, length, heads.width, dtype=heads.dtype).requires_grad_()
    key = random(1, heads.keys, length, heads.width, dtype=heads.dtype).requires_grad_()
    value = random(1, heads.keys, length, heads.value_width, dtype=heads.dtype).requires_grad_()
    weights, scale = random(length, 1, heads.value_width), heads.width**-0.5
    output, maxima = attend(query, key, value, scale, tree_mask(end), probed=True)
    assert maxima is not None
    found = [output, maxima, *torch.autograd.grad((output * weights).sum(), (query, key, value))]
    keys, values = (row.float().repeat_interleave(heads.queries // heads.keys, dim=1) for row in (key, value))
    scores = (query.float() @ keys.mT * scale).masked_fill(~visible, -torch.inf)
    exact = (torch.softmax(scores, dim=-1) @ values).transpose(1, 2)
    grads = torch.autograd.grad((exact * weights).sum(), (query, key, value))
    wanted = [exact, scores.detach().amax(dim=(0, 2, 3)), *grads]
    gaps = [
        (one - other).detach().norm() / other.detach().norm()
        for one, other in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(gaps).max())
