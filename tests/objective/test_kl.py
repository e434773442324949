"""KL estimators beside their formulas, and their gradients beside that of the KL itself."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from k2rl.config import ObjectiveConfig
from k2rl.objective.base import PolicyLossInputs
from k2rl.objective.kl import kl_to_reference
from k2rl.objective.losses import build_policy_loss
from k2rl.objective.parameters import ESTIMATORS

LENGTHS = (3, 1, 0, 5)
WORDS, TOKENS = 3, 2


def inputs() -> PolicyLossInputs:
    generator = torch.Generator().manual_seed(0)

    def values() -> Tensor:
        return -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)

    return PolicyLossInputs(
        logprobs=values().requires_grad_(),
        behaviour_logprobs=values(),
        proximal_logprobs=values(),
        sequence_index=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        advantages=torch.tensor([0.5, -1.0, 0.25, 1.0], dtype=torch.float64),
        num_sequences_total=len(LENGTHS),
        num_tokens_total=sum(LENGTHS),
        reference_logprobs=values(),
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_values_and_gradients_are_those_of_the_formulas(estimator: str) -> None:
    batch = inputs()
    assert batch.reference_logprobs is not None
    drift = (batch.logprobs.detach() - batch.reference_logprobs).tolist()
    sums = [0.0] * len(LENGTHS)
    for d, sequence in zip(drift, batch.sequence_index.tolist(), strict=True):
        sums[sequence] += d
    value, slope = {
        "k1": (lambda d: d, None),
        "k2": (lambda d: d * d / 2, lambda d: d),
        "k3": (lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    }[estimator]
    kl = kl_to_reference(batch, estimator)
    assert kl.item() == pytest.approx(sum(map(value, drift)) / len(drift), abs=1e-12)
    (gradient,) = torch.autograd.grad(kl, batch.logprobs)
    slopes = [slope(d) for d in drift] if slope else [sums[i] for i in batch.sequence_index.tolist()]
    assert gradient.tolist() == pytest.approx([s / len(drift) for s in slopes], abs=1e-12)


@pytest.mark.parametrize(("estimator", "exact"), [("k1", True), ("k2", False), ("k3", False)])
def test_of_all_responses_together_k1_has_the_gradient_of_the_kl(estimator: str, exact: bool) -> None:
    """Every response of two tokens, each as often as the policy says it."""
    generator = torch.Generator().manual_seed(1)
    rows = 1 + WORDS  # the first token's logits, and the second one's after each first
    logits = torch.randn(rows, WORDS, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(rows, WORDS, generator=generator, dtype=torch.float64).log_softmax(-1)
    ours = logits.log_softmax(-1)
    kl, estimate = torch.zeros(()), torch.zeros(())
    for first, second in product(range(WORDS), repeat=TOKENS):
        mine = torch.stack([ours[0, first], ours[1 + first, second]])
        reference = torch.stack([theirs[0, first], theirs[1 + first, second]])
        kl = kl + mine.sum().exp() * (mine.sum() - reference.sum())
        batch = replace(
            inputs(),
            logprobs=mine,
            behaviour_logprobs=mine.detach(),
            proximal_logprobs=mine.detach(),
            sequence_index=torch.zeros(TOKENS, dtype=torch.int64),
            advantages=torch.zeros(1, dtype=torch.float64),
            num_tokens_total=TOKENS,
            reference_logprobs=reference,
        )
        estimate = estimate + mine.sum().exp().detach() * kl_to_reference(batch, estimator) * TOKENS
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)
    (found,) = torch.autograd.grad(estimate, logits)
    assert torch.allclose(found, wanted, atol=1e-12) == exact
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.5
    if estimator != "k2":  # k3 is k1 with a part added whose mean is 0
        assert estimate.item() == pytest.approx(kl.item(), abs=1e-12 if exact else 1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_it_is_added_with_its_weight_and_is_nothing_at_the_reference(estimator: str) -> None:
    batch = inputs()
    plain = build_policy_loss(ObjectiveConfig())(batch)
    config = ObjectiveConfig(kl_weight=0.3, kl_estimator=estimator)
    output = build_policy_loss(config)(batch)
    kl = kl_to_reference(batch, estimator).item()
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.3 * kl, abs=1e-12)
    assert output.metrics.keys() - plain.metrics.keys() == {"reference_kl"}
    assert output.metrics["reference_kl"].item() == pytest.approx(kl)
    at_reference = replace(batch, reference_logprobs=batch.logprobs.detach())
    assert build_policy_loss(config)(at_reference).loss.item() == plain.loss.item()


def test_a_kl_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference_logprobs"):
        kl_to_reference(replace(inputs(), reference_logprobs=None), "k3")
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_to_reference(inputs(), "k4")
    with pytest.raises(ValueError, match="one length"):
        replace(inputs(), reference_logprobs=torch.zeros(1))
