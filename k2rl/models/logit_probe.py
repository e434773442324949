"""The largest attention logit of every head, as the training forward passes compute them.

Fused attention never shows its logits, so the attention function itself reports them: transformers hands a
keyword argument of the model on to it, and `k2rl_tree` (`k2rl/training/tree_attention.py`) knows `probe`. It
works block by block of queries, or by a kernel that does, so a long sequence's matrix of logits is never
whole.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogitProbe:
    """Collects max q.k * scaling (K2, arXiv 2507.20534, section 2.1) of each layer's heads, signed.

    Of pairs of positions that see each other, over all forward passes since the last `take`.
    """

    def __init__(self, layers: int, heads: int, device: torch.device | str = "cpu") -> None:
        self._maxima = torch.full((layers, heads), -torch.inf, device=device)

    def record(self, module: nn.Module, maxima: Tensor) -> None:
        """Args:
        module: the attention layer; its `layer_idx` says which.
        maxima: [heads] float32, of one block of queries or more.
        """
        row = self._maxima[module.layer_idx]  # type: ignore[index]
        torch.maximum(row, maxima, out=row)

    def take(self) -> Tensor:
        """[layers, heads] float32, -inf where nothing was seen; the probe is empty afterwards."""
        taken = self._maxima.clone()
        self._maxima.fill_(-torch.inf)
        return taken
