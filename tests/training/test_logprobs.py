"""Chunked log-probs against a plain log-softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from k2rl.training import logprobs as module
from k2rl.training.logprobs import token_logprobs


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(37, 8, generator=generator).to(dtype).requires_grad_()
    predictor = torch.tensor([0, 2, 2, 4, 1, 2])
    targets = torch.tensor([36, 0, 5, 18, 5, 0])  # first and last token, and a label that occurs twice
    return hidden, head, predictor, targets


def plain(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax((hidden @ head.T).float() / temperature, dim=-1)


@pytest.fixture(params=[(1, 1), (5, 7), (4096, 256)])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    elements, tokens = request.param
    monkeypatch.setattr(module, "CPU_CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(module, "MIN_CHUNK_TOKENS", tokens)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_values_entropy_and_gradients(temperature: float) -> None:
    hidden, head, predictor, targets = problem()
    result = token_logprobs(hidden, head, predictor, targets, temperature)
    reference = plain(hidden, head, temperature)
    torch.testing.assert_close(result.logprobs, reference[predictor, targets])
    entropy = -(reference.exp() * reference).sum(dim=1)[predictor]
    torch.testing.assert_close(result.entropy, entropy.detach())
    assert not result.entropy.requires_grad
    weights = torch.linspace(-1, 1, len(targets))
    ours = torch.autograd.grad((result.logprobs * weights).sum(), (hidden, head))
    theirs = torch.autograd.grad((reference[predictor, targets] * weights).sum(), (hidden, head))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_rounded_as_the_model_rounds_them() -> None:
    hidden, head, predictor, targets = problem(torch.bfloat16)
    result = token_logprobs(hidden, head, predictor, targets, 1.3)
    torch.testing.assert_close(result.logprobs, plain(hidden, head, 1.3)[predictor, targets])
    result.logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_gradient_of_a_sure_token_is_rounded_once() -> None:
    """1 - p of a token with p near 1 would be lost in bfloat16, had the two been rounded before."""
    hidden = torch.tensor([[8.0, 1.0]], dtype=torch.bfloat16).requires_grad_()
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]], dtype=torch.bfloat16).requires_grad_()
    zero = torch.tensor([0])
    token_logprobs(hidden, head, zero, zero, 1.0).logprobs.sum().backward()
    probs = torch.softmax((hidden @ head.T).detach().float(), dim=-1)[0]
    assert head.grad is not None
    expected = (torch.tensor([1.0, 0.0, 0.0]) - probs)[:, None] * hidden.detach().float()
    torch.testing.assert_close(head.grad.float(), expected, rtol=1e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gives_what_is_given_step_by_step(dtype: torch.dtype) -> None:
    """As on a GPU; with other numbers of rows and temperatures than those of the first call, none too."""
    for rows, temperature in ((5, 1.0), (5, 0.7), (4, 0.9), (3, 1.1), (1, 1.2), (0, 1.3)):
        hidden, head, *_ = problem(dtype)
        labels = torch.arange(rows) % 3
        results = []
        for compiled in (False, True):
            states = hidden[:rows].detach().requires_grad_()
            out = token_logprobs(
                states, head, labels[labels < rows], labels[labels < rows] * 7, temperature, 40, compiled
            )
            results.append(
                (out.logprobs, out.entropy, *torch.autograd.grad(out.logprobs.sum(), (states, head)))
            )
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, eager)


def test_no_labels() -> None:
    hidden, head, *_ = problem()
    none = torch.zeros(0, dtype=torch.int64)
    result = token_logprobs(hidden[:0], head, none, none, 1.0)
    assert result.logprobs.shape == (0,)
    result.logprobs.sum().backward()
    assert head.grad is not None
    assert float(head.grad.abs().sum()) == 0.0


def test_large_logits_do_not_overflow() -> None:
    hidden, head, predictor, targets = problem()
    result = token_logprobs(hidden * 1e4, head, predictor, targets, 1.0)
    assert bool(torch.isfinite(result.logprobs).all())


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprobs(*problem(), 0.0)
