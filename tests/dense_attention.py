"""Attention for one sequence that keeps its logits: what a probe of the real one is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "keep_logits"
LOGITS: list[tuple[int, Tensor]] = []
"""Of every call: the layer, and [heads, T, T], -inf where masked. The reader clears it."""


def keep_logits(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal, with the whole matrix of logits."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    logits = (query @ key.mT * scaling).masked_fill(mask, -torch.inf)
    LOGITS.append((module.layer_idx, logits[0].detach()))
    return (logits.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(NAME, keep_logits)
