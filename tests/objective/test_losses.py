"""The policy and PTX losses from first principles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2rl.config import ObjectiveConfig
from k2rl.errors import ConfigError
from k2rl.objective.base import PolicyLossInputs
from k2rl.objective.k2 import k2_loss, sequence_log_ratio
from k2rl.objective.losses import build_policy_loss
from k2rl.objective.ptx import ptx_loss

LENGTHS = (3, 1, 0, 5)


def inputs(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, off_policy: float = 0.3) -> PolicyLossInputs:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(sum(lengths), generator=generator)
    behaviour = logprobs + off_policy * torch.randn(sum(lengths), generator=generator)
    return PolicyLossInputs(
        logprobs=logprobs.requires_grad_(),
        behaviour_logprobs=behaviour,
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        advantages=torch.randn(len(lengths), generator=generator),
        num_sequences_total=len(lengths),
    )


def gradient(batch: PolicyLossInputs, tau: float) -> Tensor:
    loss = k2_loss(batch, tau).loss
    (result,) = torch.autograd.grad(loss, batch.logprobs)
    return result


@pytest.mark.parametrize("tau", [0.01, 0.1, 2.0])
def test_gradient_is_the_penalised_advantage(tau: float) -> None:
    """k1.5: -(A - tau log-ratio) grad log pi, averaged over sequences; written with plain loops."""
    batch = inputs()
    expected = torch.zeros_like(batch.logprobs)
    for sequence, advantage in enumerate(batch.advantages.tolist()):
        tokens = (batch.sequence_index == sequence).nonzero()[:, 0].tolist()
        log_ratio = sum((batch.logprobs.detach() - batch.behaviour_logprobs)[tokens].tolist())
        for token in tokens:
            expected[token] = -(advantage - tau * log_ratio) / len(LENGTHS)
    torch.testing.assert_close(gradient(batch, tau), expected, rtol=1e-5, atol=1e-6)


def test_finite_differences() -> None:
    batch = inputs()
    logprobs = batch.logprobs.detach().double()

    def loss(values: Tensor) -> Tensor:
        return k2_loss(
            PolicyLossInputs(
                logprobs=values,
                behaviour_logprobs=batch.behaviour_logprobs.double(),
                sequence_index=batch.sequence_index,
                advantages=batch.advantages.double(),
                num_sequences_total=batch.num_sequences_total,
            ),
            tau=0.3,
        ).loss

    assert torch.autograd.gradcheck(loss, logprobs.requires_grad_())


@given(tau=st.floats(1e-3, 10.0), other=st.floats(1e-3, 10.0))
@settings(max_examples=20, deadline=None)
def test_first_on_policy_gradient_does_not_depend_on_tau(tau: float, other: float) -> None:
    batch = inputs(off_policy=0.0)
    torch.testing.assert_close(gradient(batch, tau), gradient(batch, other), rtol=1e-5, atol=1e-7)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    batch = inputs(off_policy=0.0)
    expected = -batch.advantages[batch.sequence_index] / len(LENGTHS)
    torch.testing.assert_close(gradient(batch, 0.1), expected)


def test_the_penalty_pulls_back_to_the_behaviour_policy() -> None:
    """Equal rewards, so no advantage: descent must shrink every sequence's log-ratio."""
    batch = inputs()
    neutral = replace(batch, advantages=torch.zeros(len(LENGTHS)))
    before = sequence_log_ratio(neutral).detach()
    step = gradient(neutral, 0.5)
    moved = torch.zeros(len(LENGTHS)).index_add(0, batch.sequence_index, -0.1 * step)
    assert bool((moved * before <= 0).all())


@given(cut=st.integers(0, len(LENGTHS)), tau=st.floats(0.01, 2.0))
@settings(max_examples=20, deadline=None)
def test_micro_batches_add_up(cut: int, tau: float) -> None:
    whole = inputs()
    parts = []
    for low, high in ((0, cut), (cut, len(LENGTHS))):
        chosen = (whole.sequence_index >= low) & (whole.sequence_index < high)
        parts.append(
            k2_loss(
                PolicyLossInputs(
                    logprobs=whole.logprobs[chosen],
                    behaviour_logprobs=whole.behaviour_logprobs[chosen],
                    sequence_index=whole.sequence_index[chosen] - low,
                    advantages=whole.advantages[low:high],
                    num_sequences_total=len(LENGTHS),
                ),
                tau,
            )
        )
    total = k2_loss(whole, tau)
    torch.testing.assert_close(parts[0].loss + parts[1].loss, total.loss)
    for name, value in total.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value)
    (split,) = torch.autograd.grad(parts[0].loss + parts[1].loss, whole.logprobs)
    torch.testing.assert_close(split, gradient(whole, tau))


def test_sequences_do_not_leak_into_each_other() -> None:
    batch = inputs()
    changed = batch.advantages.clone()
    changed[0] += 1.0
    other = replace(batch, advantages=changed)
    difference = gradient(other, 0.1) - gradient(batch, 0.1)
    torch.testing.assert_close(difference, torch.where(batch.sequence_index == 0, -0.25, 0.0))


def test_inputs_that_do_not_fit_are_refused() -> None:
    batch = inputs()
    with pytest.raises(ValueError, match="one length"):
        PolicyLossInputs(batch.logprobs, batch.logprobs[1:], batch.sequence_index, batch.advantages, 4)
    with pytest.raises(ValueError, match="num_sequences_total=3"):
        PolicyLossInputs(batch.logprobs, batch.logprobs, batch.sequence_index, batch.advantages, 3)
    with pytest.raises(ValueError, match="advantages"):
        PolicyLossInputs(batch.logprobs, batch.logprobs, batch.sequence_index, batch.advantages[:, None], 4)
    with pytest.raises(ValueError, match="tau"):
        k2_loss(batch, 0.0)


def test_losses_are_found_by_name() -> None:
    batch = inputs()
    chosen = build_policy_loss(ObjectiveConfig(name="k2", tau=0.7))
    assert torch.equal(chosen(batch).loss, k2_loss(batch, 0.7).loss)
    with pytest.raises(ConfigError, match=r"objective\.name='ppo'"):
        build_policy_loss(ObjectiveConfig(name="ppo"))


def test_ptx_is_the_mean_over_its_own_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -6.0])
    assert float(ptx_loss(logprobs, 3)) == pytest.approx(3.0)
    assert float(ptx_loss(logprobs[:1], 3) + ptx_loss(logprobs[1:], 3)) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="num_tokens_total"):
        ptx_loss(logprobs, 2)
