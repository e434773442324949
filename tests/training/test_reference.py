"""The reference of a KL, and the optimizer that is new in each step, in the trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from tiny_models import random_groups

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.training.engine import TrainEngine

PLAIN = ObjectiveConfig(tau=0.2)
WITH_KL = replace(PLAIN, kl_weight=0.1)
TEMPERATURE = 1.2


def make_engine(path: Path, dtype: str = "float32", **optimizer: object) -> TrainEngine:
    config = OptimizerConfig(lr=1e-2, **optimizer)  # type: ignore[arg-type]
    return TrainEngine(path, dtype, config, micro_batch_tokens=64, num_threads=1)


def step(engine: TrainEngine, seed: int, objective: ObjectiveConfig = WITH_KL) -> dict[str, float]:
    return engine.policy_step(random_groups(seed), objective=objective, temperature=TEMPERATURE)


def bits(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: master.detach().clone() for name, master in engine._weights.named_masters()}


def same(one: TrainEngine, other: TrainEngine) -> bool:
    theirs = bits(other)
    return all(torch.equal(value, theirs[name]) for name, value in bits(one).items())


def sampled(engine: TrainEngine, seed: int) -> list[float]:
    """Log-probs of a batch's sampled tokens."""
    sequences = [sequence for group in random_groups(seed) for sequence in group]
    rows = engine.logprobs([list(sequence.token_ids) for sequence in sequences], TEMPERATURE)
    return [
        value
        for sequence, row in zip(sequences, rows, strict=True)
        for value, chosen in zip(row, sequence.sampled_mask[1:], strict=True)
        if chosen
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kl_is_measured_from_the_policy_before_the_first_step(llama_path: Path, dtype: str) -> None:
    first, engine = make_engine(llama_path, dtype), make_engine(llama_path, dtype)
    assert step(engine, 1)["reference_kl"] == 0
    step(engine, 2)
    drift = [p - r for p, r in zip(sampled(engine, 3), sampled(first, 3), strict=True)]
    k3 = fmean(torch.expm1(-torch.tensor(drift)).add(torch.tensor(drift)).tolist())
    assert k3 > 1e-4
    assert step(engine, 3)["reference_kl"] == pytest.approx(k3, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_the_reference_leaves_the_policy_as_it_is(llama_path: Path, dtype: str) -> None:
    plain, other = make_engine(llama_path, dtype), make_engine(llama_path, dtype)
    for seed in range(3):
        step(plain, seed, PLAIN)
        step(other, seed, replace(PLAIN, kl_weight=1e-30))
    assert same(plain, other)
    assert other.state_bytes()["parameters"] > plain.state_bytes()["parameters"]


def test_the_kl_alone_brings_the_policy_back(llama_path: Path) -> None:
    engine = make_engine(llama_path, name="adamw")
    engine.reset_optimizer(3e-3)
    for _ in range(5):
        away = step(engine, 1, replace(PLAIN, kl_weight=1e-30))["reference_kl"]
    kls = [
        step(engine, 1, replace(PLAIN, kl_weight=1e3, kl_estimator="k2"))["reference_kl"] for _ in range(10)
    ]
    assert kls[-1] < 0.2 * away


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_keeps_the_reference(llama_path: Path, tmp_path: Path, dtype: str) -> None:
    straight, resumed = make_engine(llama_path, dtype), make_engine(llama_path, dtype)
    step(straight, 1)
    straight.save(tmp_path / "ck")
    straight.saved()
    resumed.load(tmp_path / "ck")
    one, other = step(straight, 2), step(resumed, 2)
    assert one["reference_kl"] == other["reference_kl"] > 0
    assert same(straight, resumed)
    plain = make_engine(llama_path, dtype)
    plain.save(tmp_path / "plain")
    plain.saved()
    resumed.load(tmp_path / "plain")
    assert step(resumed, 1)["reference_kl"] == 0


def test_an_optimizer_that_is_new_in_each_step_has_no_momentum(llama_path: Path) -> None:
    engine, by_hand = make_engine(llama_path, reset_each_step=True), make_engine(llama_path)
    keeping = make_engine(llama_path)
    for seed in (1, 2):
        by_hand.reset_optimizer(1e-2)
        for each in (engine, by_hand, keeping):
            step(each, seed, PLAIN)
    assert same(engine, by_hand)
    assert not same(engine, keeping)
