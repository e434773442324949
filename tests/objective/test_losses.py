"""The policy and PTX losses from first principles: each beside its formula, written with plain loops."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2rl.choices import config_folder
from k2rl.composition import compose
from k2rl.config import ObjectiveConfig
from k2rl.errors import ConfigError
from k2rl.objective.base import PolicyLossInputs
from k2rl.objective.k2 import k2_loss
from k2rl.objective.losses import build_policy_loss
from k2rl.objective.parameters import PARAMETERS, check_objective
from k2rl.objective.ptx import ptx_loss

LENGTHS = (3, 1, 0, 5)
AVERAGES = ("tokens", "sequences", "sums")


def inputs(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, off_policy: float = 0.3) -> PolicyLossInputs:
    """In float64; three policies, `off_policy` apart."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return off_policy * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

    logprobs = -torch.rand(sum(lengths), generator=generator, dtype=torch.float64)
    proximal = logprobs + noise()
    return PolicyLossInputs(
        logprobs=logprobs.requires_grad_(),
        behaviour_logprobs=(proximal + noise()).detach(),
        proximal_logprobs=proximal.detach(),
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        advantages=torch.randn(len(lengths), generator=generator, dtype=torch.float64),
        num_sequences_total=len(lengths),
        num_tokens_total=max(sum(lengths), 1),
    )


def part(whole: PolicyLossInputs, low: int, high: int) -> PolicyLossInputs:
    """The micro-batch of sequences low to high."""
    chosen = (whole.sequence_index >= low) & (whole.sequence_index < high)
    return replace(
        whole,
        logprobs=whole.logprobs[chosen],
        behaviour_logprobs=whole.behaviour_logprobs[chosen],
        proximal_logprobs=whole.proximal_logprobs[chosen],
        sequence_index=whole.sequence_index[chosen] - low,
        advantages=whole.advantages[low:high],
    )


def gradient(batch: PolicyLossInputs, config: ObjectiveConfig) -> Tensor:
    (result,) = torch.autograd.grad(build_policy_loss(config)(batch).loss, batch.logprobs)
    return result


def corrected(**settings: object) -> list[ObjectiveConfig]:
    """Without a correction, with both, each averaged in every way."""
    corrections = ((None, None), ("truncated", 1.2), ("masked", 1.2))
    return [
        ObjectiveConfig(tau=None, average_over=over, correction=kind, correction_cap=cap, **settings)  # type: ignore[arg-type]
        for over in AVERAGES
        for kind, cap in corrections
    ]


CONFIGS = [
    *(ObjectiveConfig(name=name, tau=tau) for name in ("k2", "k2_token") for tau in (0.01, 0.1, 2.0)),
    ObjectiveConfig(name="k2_5", tau=0.3, log_ratio_min=-0.2, log_ratio_max=0.3),
    ObjectiveConfig(name="k2_5", tau=0.0, log_ratio_min=-0.2, log_ratio_max=0.3),
    *corrected(name="clipped", clip_low=0.2, clip_high=0.28),
    ObjectiveConfig(name="gspo", tau=None, clip_low=0.05, clip_high=0.1),
    *corrected(name="cispo", clip_low=0.1, clip_high=0.2),
    *corrected(name="reinforce"),
]


def label(config: ObjectiveConfig) -> str:
    values = (getattr(config, field.name) for field in fields(config) if field.name != "baseline")
    return "-".join(str(value) for value in values if value is not None)


by_config = pytest.mark.parametrize("config", CONFIGS, ids=label)


def reference(batch: PolicyLossInputs, c: ObjectiveConfig) -> Tensor:
    """The papers' formulas, a sequence and a token at a time; what has no gradient is a float."""
    n, total = batch.num_sequences_total, batch.num_tokens_total
    loss = 0 * batch.logprobs.sum()
    for sequence, a in enumerate(batch.advantages.tolist()):
        tokens = (batch.sequence_index == sequence).nonzero()[:, 0].tolist()
        if c.name == "k2":
            drift = sum(batch.logprobs[t] - batch.behaviour_logprobs[t] for t in tokens)
            loss = loss + (a - c.tau * drift) ** 2 / (2 * c.tau * n)  # type: ignore[operator]
        elif c.name == "gspo":
            mean = sum(batch.logprobs[t] - batch.proximal_logprobs[t] for t in tokens) / max(len(tokens), 1)
            loss = loss + surrogate(torch.exp(mean + 0 * batch.logprobs.sum()), a, c) / n
        else:
            over = c.average_over or "tokens"
            scale = {"tokens": total, "sequences": len(tokens) * n, "sums": n}[over]
            for t in tokens:
                policies = (
                    batch.logprobs[t],
                    float(batch.proximal_logprobs[t]),
                    float(batch.behaviour_logprobs[t]),
                )
                loss = loss + token_loss(*policies, a, c) / scale
    return loss


def surrogate(ratio: Tensor, a: float, c: ObjectiveConfig) -> Tensor | float:
    cut = min(max(ratio.item(), 1 - (c.clip_low or 0)), 1 + (c.clip_high or 0)) * a
    return -ratio * a if ratio.item() * a <= cut else -cut


def token_loss(
    logprob: Tensor, proximal: float, behaviour: float, a: float, c: ObjectiveConfig
) -> Tensor | float:
    drift, ratio = logprob - behaviour, torch.exp(logprob - proximal)
    weight, cap = math.exp(proximal - behaviour), c.correction_cap or 0
    kept = {"truncated": min(weight, cap), "masked": weight if cap and 1 / cap <= weight <= cap else 0.0}
    weight = kept[c.correction] if c.correction else 1.0
    match c.name:
        case "k2_token":
            return (a - c.tau * drift) ** 2 / (2 * c.tau)  # type: ignore[operator]
        case "k2_5":
            low, high = c.log_ratio_min or 0, c.log_ratio_max or 0
            inside = low <= drift.item() <= high
            weighted = torch.exp(drift) if inside else math.exp(low if drift.item() < 0 else high)
            return (c.tau or 0) * drift**2 - weighted * a
        case "clipped":
            return weight * surrogate(ratio, a, c)
        case "cispo":
            return (
                -weight * min(max(ratio.item(), 1 - (c.clip_low or 0)), 1 + (c.clip_high or 0)) * a * logprob
            )
        case "reinforce":
            return -weight * a * logprob
    raise AssertionError(c.name)


@by_config
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_of_the_definition(config: ObjectiveConfig, seed: int) -> None:
    batch = inputs(seed)
    expected = reference(batch, config)
    torch.testing.assert_close(build_policy_loss(config)(batch).loss, expected, rtol=1e-9, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected, batch.logprobs)
    torch.testing.assert_close(gradient(batch, config), wanted, rtol=1e-9, atol=1e-12)


@by_config
@pytest.mark.parametrize("cut", range(len(LENGTHS) + 1))
def test_micro_batches_add_up(config: ObjectiveConfig, cut: int) -> None:
    whole, loss = inputs(), build_policy_loss(config)
    parts = [loss(part(whole, 0, cut)), loss(part(whole, cut, len(LENGTHS)))]
    total = loss(whole)
    torch.testing.assert_close(parts[0].loss + parts[1].loss, total.loss)
    for name, value in total.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value)
    (split,) = torch.autograd.grad(parts[0].loss + parts[1].loss, whole.logprobs)
    torch.testing.assert_close(split, gradient(whole, config))


@by_config
def test_sequences_do_not_leak_into_each_other(config: ObjectiveConfig) -> None:
    batch = inputs()
    changed = batch.advantages.clone()
    changed[0] += 1.0
    difference = gradient(replace(batch, advantages=changed), config) - gradient(batch, config)
    assert bool((difference[batch.sequence_index != 0] == 0).all())


@by_config
def test_without_an_advantage_only_the_pull_to_the_behaviour_policy_is_left(config: ObjectiveConfig) -> None:
    """Descent shrinks what K2's losses square; the others have no gradient at all."""
    batch = inputs()
    neutral = replace(batch, advantages=torch.zeros_like(batch.advantages))
    step = gradient(neutral, config)
    drift = (batch.logprobs - batch.behaviour_logprobs).detach()
    if config.name == "k2":
        moved, drift = batch.sequence_sum(-step), batch.sequence_sum(drift)
    elif config.tau:
        moved = -step
    else:
        assert bool((step == 0).all())
        return
    assert bool((moved * drift <= 0).all())
    assert bool(step.abs().sum() > 0)


@given(tau=st.floats(1e-3, 10.0), other=st.floats(1e-3, 10.0), name=st.sampled_from(["k2", "k2_token"]))
@settings(max_examples=20, deadline=None)
def test_first_on_policy_gradient_does_not_depend_on_tau(tau: float, other: float, name: str) -> None:
    batch = inputs(off_policy=0.0)
    one, two = (gradient(batch, ObjectiveConfig(name=name, tau=value)) for value in (tau, other))
    torch.testing.assert_close(one, two)


@by_config
def test_on_policy_every_gradient_is_the_policy_gradient(config: ObjectiveConfig) -> None:
    """`-A grad log pi`, averaged as the objective does."""
    batch = inputs(off_policy=0.0)
    over = {"k2": "sums", "k2_token": "tokens", "k2_5": "tokens", "gspo": "sequences"}
    loss = batch.average(-batch.token_advantages * batch.logprobs, config.average_over or over[config.name])
    (expected,) = torch.autograd.grad(loss, batch.logprobs)
    torch.testing.assert_close(gradient(batch, config), expected)


def test_a_masked_token_has_no_gradient_whatever_its_advantage() -> None:
    """K2.5; PPO's clip lets a token through that moves back."""
    batch = inputs(lengths=(1, 1, 1, 1))
    drift = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64)
    batch = replace(
        batch,
        behaviour_logprobs=(batch.logprobs - drift).detach(),
        proximal_logprobs=(batch.logprobs - drift).detach(),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64),
    )
    masked = ObjectiveConfig(name="k2_5", tau=0.0, log_ratio_min=-0.2, log_ratio_max=0.2)
    assert gradient(batch, masked).tolist() == [0.0] * 4
    clipped = ObjectiveConfig(name="clipped", tau=None, clip_low=0.2, clip_high=0.2, average_over="sums")
    assert [value != 0 for value in gradient(batch, clipped).tolist()] == [False, True, True, False]
    assert float(build_policy_loss(masked)(batch).metrics["clipped"]) == 1.0
    assert float(build_policy_loss(clipped)(batch).metrics["clipped"]) == 0.5


def test_inputs_that_do_not_fit_are_refused() -> None:
    batch = inputs()
    for name in ("behaviour_logprobs", "proximal_logprobs", "sequence_index"):
        with pytest.raises(ValueError, match="one length"):
            replace(batch, **{name: getattr(batch, name)[1:]})
    with pytest.raises(ValueError, match="num_sequences_total=3"):
        replace(batch, num_sequences_total=3)
    with pytest.raises(ValueError, match="num_tokens_total=8"):
        replace(batch, num_tokens_total=8)
    with pytest.raises(ValueError, match="advantages"):
        replace(batch, advantages=batch.advantages[:, None])
    with pytest.raises(ValueError, match="tau"):
        k2_loss(batch, 0.0)


def test_every_objective_file_composes_and_trains() -> None:
    for file in sorted((config_folder() / "objective").glob("*.yaml")):
        chosen = compose([f"objective={file.stem}"]).objective
        check_objective(chosen)
        assert bool(gradient(inputs(off_policy=0), chosen).abs().sum() > 0), file.stem
    assert {compose([f"objective={name}"]).objective.name for name in ("grpo", "dr_grpo", "dapo")} == {
        "clipped"
    }


def test_every_loss_is_tried() -> None:
    assert {config.name for config in CONFIGS} == set(PARAMETERS)


REINFORCE = {"name": "reinforce", "tau": None, "average_over": "sums"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ppo"}, r"objective\.name='ppo' is not one of: k2, "),
        (
            {"name": "clipped", "clip_low": 0.2, "clip_high": 0.2, "average_over": "sums"},
            "tau=0.1 does nothing",
        ),
        ({"clip_low": 0.2}, "clip_low=0.2 does nothing with objective.name=k2"),
        ({"tau": None}, "objective.name=k2 needs objective.tau"),
        ({"name": "reinforce", "tau": None}, "needs objective.average_over"),
        ({"baseline": "normalised"}, "their scale has a meaning"),
        (
            {"name": "reinforce", "tau": None, "average_over": "sums", "baseline": "exponential"},
            "needs objective.tau",
        ),
        (
            {"name": "reinforce", "tau": None, "average_over": "sums", "correction": "masked"},
            "set both or neither",
        ),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(ObjectiveConfig(**settings))  # type: ignore[arg-type]


def test_ptx_is_the_mean_over_its_own_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -6.0])
    assert float(ptx_loss(logprobs, 3)) == pytest.approx(3.0)
    assert float(ptx_loss(logprobs[:1], 3) + ptx_loss(logprobs[1:], 3)) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="num_tokens_total"):
        ptx_loss(logprobs, 2)
