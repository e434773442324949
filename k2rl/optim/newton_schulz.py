"""Approximate orthogonalisation by Newton-Schulz iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from k2rl.hardware import fast_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the quintic; from Keller Jordan's Muon, used by Moonlight and K2."""

EPS = 1e-7
"""Floor of the Frobenius norm, so that a zero gradient gives a zero update."""


def newton_schulz(matrix: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Push all singular values of a matrix to about 1, keeping its singular vectors.

    X0 = M / ||M||_F, then `steps` times X = a X + b (X X^T) X + c (X X^T)^2 X
    (Kimi K2, arXiv 2507.20534, Algorithm 1; Moonlight, arXiv 2502.16982, equation 2). The coefficients
    trade exactness for speed: singular values end between about 0.7 and 1.2, not at 1.

    One matrix at a time: on CPU it then stays in the cache, which beats batched products over matrices
    of equal shape by about a fifth.

    Args:
        matrix: [n, m], any dtype; left as it is.
        steps: iterations; 5 in both papers.
        dtype: the iteration's dtype; default bfloat16, which is accurate enough, where the hardware
            multiplies it, else float32.

    Returns:
        [n, m] in `dtype`.

    Raises:
        ValueError: if `matrix` is not 2-D.
    """
    if matrix.ndim != 2:
        raise ValueError(f"newton_schulz takes a matrix, not a tensor of shape {tuple(matrix.shape)}")
    dtype = dtype or getattr(torch, fast_dtype(matrix.is_cuda))
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype, copy=True)
    x = x.T if tall else x  # the Gram matrix of the shorter side is the cheaper one
    x.div_(x.norm().clamp(min=EPS))
    if dtype == torch.float32 and x.shape[1] >= 2 * x.shape[0] and steps > 0:
        x = _iterate_on_gram(x, steps)
    else:
        x = _iterate(x, steps)
    return x.T if tall else x


def _iterate(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def _iterate_on_gram(x: Tensor, steps: int) -> Tensor:
    """The same on the n x n Gram matrix: with P = a + b R + c R^2, X -> P X makes R = X X^T -> P R P.

    The long side then costs two products instead of two a step. Polynomials of one matrix commute, so
    all of them can be gathered in one factor of X. Rounding grows with R's condition, the square of X's:
    good enough in float32 (1e-3 on gradients of low rank), not in bfloat16.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    factor: Tensor | None = None
    for step in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        factor = polynomial if factor is None else factor @ polynomial
        if step + 1 < steps:
            gram = gram @ polynomial @ polynomial
    assert factor is not None
    return factor @ x
