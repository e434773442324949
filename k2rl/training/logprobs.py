"""Log-probs of chosen tokens from hidden states, without ever holding the logits of a whole row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22
"""Logits (float32) alive at once: 16 MiB stay in a CPU's cache through the softmax."""
MIN_CHUNK_TOKENS = 256
"""Vocabulary entries in a chunk, at least: narrower matrix products waste the machine."""


@dataclass(frozen=True)
class TokenLogprobs:
    #: [N] float32 with gradient.
    logprobs: Tensor
    #: [N] float32, detached: entropy in nats of the distribution each label was predicted from.
    entropy: Tensor


def token_logprobs(
    hidden: Tensor, head: Tensor, predictor: Tensor, targets: Tensor, temperature: float
) -> TokenLogprobs:
    """`log softmax(hidden @ head.T / temperature)` at the targets.

    Logits are computed in the compute dtype, as the inference engine does, and normalised in float32.
    They are made for one slice of the vocabulary after the other, and again in the backward pass, so
    neither direction holds more than a slice of them.

    Args:
        hidden: [U, D], final hidden states of the predicting positions.
        head: [V, D], the output embedding.
        predictor: [N] int64 in [0, U), which hidden state predicts each label.
        targets: [N] int64 in [0, V).
        temperature: the sampling temperature, greater than 0.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0")
    logprobs, entropy = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head, predictor, targets, temperature
    )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


class _ChunkedLogprobs(torch.autograd.Function):
    """Softmax over slices of the vocabulary with a running maximum; backward rebuilds each slice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, predictor: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        maximum = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        exp_sum = hidden.new_zeros(count, dtype=torch.float32)
        weighted_sum = hidden.new_zeros(count, dtype=torch.float32)
        target_logits = hidden.new_empty(targets.shape[0], dtype=torch.float32)
        for tokens, labels in _slices(count, head.shape[0], targets):
            logits = _logits(hidden, head, tokens, temperature)
            target_logits[labels] = logits[predictor[labels], targets[labels] - tokens.start]
            previous, maximum = maximum, torch.maximum(maximum, logits.amax(dim=1))
            rescale = torch.exp(previous - maximum)
            exps = torch.exp(logits - maximum[:, None])
            exp_sum = exp_sum * rescale + exps.sum(dim=1)
            weighted_sum = weighted_sum * rescale + exps.mul_(logits).sum(dim=1)
        log_normaliser = maximum + torch.log(exp_sum)
        entropy = (log_normaliser - weighted_sum / exp_sum)[predictor]
        ctx.save_for_backward(hidden, head, predictor, targets, log_normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return target_logits - log_normaliser[predictor], entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, predictor, targets, log_normaliser = ctx.saved_tensors
        grad = grads[0].float() / ctx.temperature
        row_grad = torch.zeros_like(log_normaliser).index_add_(0, predictor, grad)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_head = torch.empty_like(head)
        for tokens, labels in _slices(hidden.shape[0], head.shape[0], targets):
            logits = _logits(hidden, head, tokens, ctx.temperature)
            # d logp / d logits = onehot - softmax; several labels may share a row.
            grad_logits = logits.sub_(log_normaliser[:, None]).exp_().mul_(-row_grad[:, None])
            where = (predictor[labels], targets[labels] - tokens.start)
            grad_logits.index_put_(where, grad[labels], accumulate=True)
            rounded = grad_logits.to(hidden.dtype)
            grad_hidden += rounded @ head[tokens]
            torch.mm(rounded.T, hidden, out=grad_head[tokens])
        return grad_hidden.to(hidden.dtype), grad_head, None, None, None


def _logits(hidden: Tensor, head: Tensor, tokens: slice, temperature: float) -> Tensor:
    """[U, slice] float32."""
    logits = (hidden @ head[tokens].T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _slices(count: int, vocabulary: int, targets: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the vocabulary, each with the indices of the labels whose target lies in it."""
    size = max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // max(1, count))
    starts = torch.arange(0, vocabulary, size, device=targets.device)
    by_target = torch.argsort(targets, stable=True)
    first = torch.searchsorted(targets[by_target], starts)[1:].tolist()
    for start, labels in zip(starts.tolist(), by_target.tensor_split(first), strict=True):
        yield slice(start, min(start + size, vocabulary)), labels
