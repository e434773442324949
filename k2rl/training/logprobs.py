"""Log-probs of chosen tokens from hidden states, without ever holding the logits of a whole row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CPU_CHUNK_ELEMENTS = 2**22
"""Logits alive at once: 16 MiB of float32 stay in a CPU's cache through the softmax."""
CUDA_CHUNK_ELEMENTS = 2**27
"""On a GPU: 256 MiB of bfloat16, twice; smaller ones leave it waiting for launches."""
MIN_CHUNK_TOKENS = 256
"""Vocabulary entries in a chunk, at least: narrower matrix products waste the machine."""


@dataclass(frozen=True)
class TokenLogprobs:
    #: [N] float32 with gradient.
    logprobs: Tensor
    #: [N] float32, detached: entropy in nats of the distribution each label was predicted from.
    entropy: Tensor


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    predictor: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_elements: int | None = None,
    compiled: bool | None = None,
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
        chunk_elements: logits alive at once; default: what suits the device.
        compiled: whether `torch.compile` fuses what is done to a slice; default: on a GPU, where each
            pass over a slice else goes through its memory.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be greater than 0")
    elements = chunk_elements or (CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CPU_CHUNK_ELEMENTS)
    size = max(MIN_CHUNK_TOKENS, elements // max(1, len(hidden)))
    compiled = hidden.is_cuda if compiled is None else compiled
    logprobs, entropy = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head, predictor, targets, temperature, size, compiled
    )
    return TokenLogprobs(logprobs=logprobs, entropy=entropy)


class _ChunkedLogprobs(torch.autograd.Function):
    """Softmax over slices of the vocabulary, put together; backward rebuilds each slice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        predictor: Tensor,
        targets: Tensor,
        temperature: float,
        size: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        pairs = _Pairs.of(predictor, targets, len(hidden), len(head), size)
        # A tensor, as each other number would be compiled anew.
        scale = None if temperature == 1.0 else hidden.new_full((), temperature, dtype=torch.float32)
        normaliser = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        mean = torch.zeros_like(normaliser)
        chosen = torch.empty_like(pairs.rows, dtype=torch.float32)
        summarise = _fused(_summary) if compiled else _summary
        for tokens, some in pairs.slices():
            logits = hidden @ head[tokens].T
            chosen[some] = _scaled(logits[pairs.at(tokens, some)], scale)
            of_slice, mean_of_slice = summarise(logits, scale)
            previous, normaliser = normaliser, torch.logaddexp(normaliser, of_slice)
            mean = mean * torch.exp(previous - normaliser)
            mean += mean_of_slice * torch.exp(of_slice - normaliser)
        entropy = (normaliser - mean)[predictor]
        ctx.save_for_backward(hidden, head, predictor, normaliser)
        ctx.pairs, ctx.scale, ctx.compiled = pairs, scale, compiled
        ctx.mark_non_differentiable(entropy)
        return chosen[pairs.of_label] - normaliser[predictor], entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, predictor, normaliser = ctx.saved_tensors
        pairs: _Pairs = ctx.pairs
        grad = _scaled(grads[0], ctx.scale)
        row_grad = torch.zeros_like(normaliser).index_add_(0, predictor, grad)
        pair_grad = row_grad.new_zeros(len(pairs.rows)).index_add_(0, pairs.of_label, grad)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_head = torch.empty_like(head)
        spread = _fused(_gradient) if ctx.compiled else _gradient
        for tokens, some in pairs.slices():
            logits = hidden @ head[tokens].T
            # d logp / d logits = onehot - softmax, of which the difference is taken before it is rounded.
            rows = pairs.rows[some]
            probs = torch.exp(_scaled(logits[pairs.at(tokens, some)], ctx.scale) - normaliser[rows])
            exact = pair_grad[some] - probs * row_grad[rows]
            grad_logits = spread(logits, normaliser, row_grad, ctx.scale)
            grad_logits[pairs.at(tokens, some)] = exact.to(grad_logits.dtype)
            grad_hidden += grad_logits @ head[tokens]
            torch.mm(grad_logits.T, hidden, out=grad_head[tokens])
        return grad_hidden.to(hidden.dtype), grad_head, None, None, None, None, None


@dataclass(frozen=True)
class _Pairs:
    """The places in the matrix of logits that labels ask for, each once, by slices of the vocabulary."""

    #: [P] int64, rows and columns, ascending by column.
    rows: Tensor
    tokens: Tensor
    #: [N] int64, each label's place.
    of_label: Tensor
    vocabulary: int
    #: Columns in a slice.
    size: int
    #: One past each slice's last place.
    ends: tuple[int, ...]

    @classmethod
    def of(cls, predictor: Tensor, targets: Tensor, rows: int, vocabulary: int, size: int) -> _Pairs:
        keys, of_label = torch.unique(targets * max(1, rows) + predictor, return_inverse=True)
        tokens = keys // max(1, rows)
        stops = torch.arange(size, vocabulary + size, size, device=tokens.device)
        ends = tuple(torch.searchsorted(tokens, stops).tolist())  # the only time that a GPU is waited for
        return cls(keys % max(1, rows), tokens, of_label, vocabulary, size, ends)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the vocabulary, and the places in each."""
        first = 0
        for index, end in enumerate(self.ends):
            start = index * self.size
            yield slice(start, min(start + self.size, self.vocabulary)), slice(first, end)
            first = end

    def at(self, tokens: slice, some: slice) -> tuple[Tensor, Tensor]:
        """Their indices in the logits of a slice."""
        return self.rows[some], self.tokens[some] - tokens.start


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    """`values / scale` in float32; without a scale the same memory, if they are float32 already."""
    return values.float() if scale is None else values.float() / scale


def _summary(logits: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of [U, slice]: log-normaliser, and mean logit under the softmax; [U] float32 each."""
    logits = _scaled(logits, scale)
    probs = torch.softmax(logits, dim=1)
    normaliser = logits.amax(dim=1) - torch.log(probs.amax(dim=1))
    return normaliser, probs.mul_(logits).sum(dim=1)


def _gradient(logits: Tensor, normaliser: Tensor, row_grad: Tensor, scale: Tensor | None) -> Tensor:
    """-row_grad * softmax in the logits' dtype, [U, slice]; their own memory where that is float32."""
    probs = _scaled(logits, scale).sub_(normaliser[:, None]).exp_()
    return probs.mul_(-row_grad[:, None]).to(logits.dtype)


@cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """One pass over the logits instead of several; compiled once for all numbers of rows and columns."""
    return torch.compile(function, dynamic=True)
