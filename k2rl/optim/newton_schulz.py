"""Approximate orthogonalisation by Newton-Schulz iteration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from k2rl.hardware import fast_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the quintic; from Keller Jordan's Muon, used by Moonlight and K2."""

EPS = 1e-7
"""Floor of the Frobenius norm, so that a zero gradient gives a zero update."""

CPU_BATCH_SIDE = 128
"""On a CPU, matrices with a shorter side up to this are multiplied in batches: of small ones each call
costs more than its arithmetic, and larger ones one at a time stay in the cache (`make bench-optim`)."""

CUDA_BATCH_ELEMENTS = 2**28
"""Elements in a batch on a GPU, at most: its temporaries are three times that."""


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, which is accurate enough, where the hardware multiplies it, else float32."""
    dtype: torch.dtype = getattr(torch, fast_dtype(device.type == "cuda"))
    return dtype


def orthogonalise(
    matrices: Sequence[Tensor], steps: int, dtype: torch.dtype | None = None, batched: bool | None = None
) -> list[Tensor]:
    """`newton_schulz` of many matrices, those of one shape (or its transpose) together where that is faster.

    Args:
        matrices: [n, m] each, any dtype, on one device; left as they are.
        steps: iterations.
        dtype: of the iteration; default: what the hardware multiplies.
        batched: whether to batch; default: what was measured to be faster.

    Returns:
        [n, m] each, in `dtype`.
    """
    by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[min(matrix.shape), max(matrix.shape)].append(index)
    results: dict[int, Tensor] = {}
    for (short, long), indices in by_shape.items():
        on_cuda = matrices[indices[0]].is_cuda
        size = max(1, CUDA_BATCH_ELEMENTS // (short * long)) if on_cuda else len(indices)
        if not (on_cuda or short <= CPU_BATCH_SIDE if batched is None else batched):
            size = 1
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            if len(chunk) == 1:
                results[chunk[0]] = newton_schulz(matrices[chunk[0]], steps, dtype)
                continue
            tall = [index for index in chunk if matrices[index].shape[0] > matrices[index].shape[1]]
            wide = [index for index in chunk if matrices[index].shape[0] <= matrices[index].shape[1]]
            # Transposed together: to stack transposed ones takes a GPU a launch for each.
            parts = [torch.stack([matrices[index] for index in some]) for some in (tall, wide) if some]
            if tall:
                parts[0] = parts[0].mT
            together = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            batch = newton_schulz(together, steps, dtype)
            results.update(zip(tall, batch[: len(tall)].mT, strict=True))
            results.update(zip(wide, batch[len(tall) :], strict=True))
    return [results[index] for index in range(len(matrices))]


def newton_schulz(matrix: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Push all singular values of a matrix to about 1, keeping its singular vectors.

    X0 = M / ||M||_F, then `steps` times X = a X + b (X X^T) X + c (X X^T)^2 X
    (Kimi K2, arXiv 2507.20534, Algorithm 1; Moonlight, arXiv 2502.16982, equation 2). The coefficients
    trade exactness for speed: singular values end between about 0.7 and 1.2, not at 1.

    Args:
        matrix: [n, m] or a batch of them [B, n, m], any dtype; left as it is.
        steps: iterations; 5 in both papers.
        dtype: the iteration's dtype; default bfloat16, which is accurate enough, where the hardware
            multiplies it, else float32.

    Returns:
        The same shape in `dtype`.

    Raises:
        ValueError: if `matrix` is neither.
    """
    if matrix.ndim not in (2, 3):
        raise ValueError(f"newton_schulz takes a matrix or a batch, not a shape of {tuple(matrix.shape)}")
    dtype = dtype or default_dtype(matrix.device)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.to(dtype, copy=True)
    x = x.mT if tall else x  # the Gram matrix of the shorter side is the cheaper one
    x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS))
    if dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2] and steps > 0:
        x = _iterate_on_gram(x, steps)
    else:
        x = _iterate(x, steps)
    return x.mT if tall else x


def _iterate(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a)
    return x


def _iterate_on_gram(x: Tensor, steps: int) -> Tensor:
    """The same on the n x n Gram matrix: with P = a + b R + c R^2, X -> P X makes R = X X^T -> P R P.

    The long side then costs two products instead of two a step. Polynomials of one matrix commute, so
    all of them can be gathered in one factor of X. Rounding grows with R's condition, the square of X's:
    good enough in float32 (1e-3 on gradients of low rank), not in bfloat16.
    """
    a, b, c = COEFFICIENTS
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    gram = x @ x.mT
    factor: Tensor | None = None
    for step in range(steps):
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else factor @ polynomial
        if step + 1 < steps:
            gram = gram @ polynomial @ polynomial
    assert factor is not None
    return factor @ x
