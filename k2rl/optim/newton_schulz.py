"""Approximate orthogonalisation by Newton-Schulz iteration, batched over matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the quintic; from Keller Jordan's Muon, used by Moonlight and K2."""

EPS = 1e-7
"""Floor of the Frobenius norm, so that a zero gradient gives a zero update."""


def orthogonalise(matrices: Sequence[Tensor], steps: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Push all singular values of each matrix to about 1, keeping its singular vectors.

    X0 = M / ||M||_F, then `steps` times X = a X + b (X X^T) X + c (X X^T)^2 X
    (Kimi K2, arXiv 2507.20534, Algorithm 1; Moonlight, arXiv 2502.16982, equation 2). The coefficients
    trade exactness for speed: singular values end between about 0.7 and 1.2, not at 1.

    Args:
        matrices: of one shape up to transposition, any dtype.
        steps: iterations; 5 in both papers.
        dtype: the iteration's dtype; bfloat16 is enough and the fastest.

    Returns:
        In `dtype`, each in its matrix's own shape.
    """
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    x = torch.stack([matrix.to(dtype) for matrix in wide])
    x /= torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp(min=EPS).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return [
        result.T if matrix.shape[0] > matrix.shape[1] else result
        for matrix, result in zip(matrices, x, strict=True)
    ]
