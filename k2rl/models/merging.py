"""A weight and its adapter as one weight."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`weight + scale * b @ a`, computed in float32, in the weight's dtype.

    Args:
        weight: [out, in].
        a: [rank, in].
        b: [out, rank].
        scale: of the product.
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)
