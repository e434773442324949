"""A mixture of experts in the trainer: pushed and saved as checkpoints name it, router biases included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_texts

from k2rl.checkpoint_engine.publisher import expected_tensors
from k2rl.config import OptimizerConfig
from k2rl.models.hub import resolve_model
from k2rl.training.engine import TrainEngine

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
RATE = 0.01


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model("tiny-deepseek")


def make_engine(path: Path, dtype: str = "float32") -> TrainEngine:
    optimizer = OptimizerConfig(lr=1e-3, router_bias_rate=RATE)
    return TrainEngine(path, dtype, optimizer, micro_batch_tokens=64, num_threads=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_push_has_what_vllm_expects(path: Path, dtype: str) -> None:
    tensors = make_engine(path, dtype).weights_source().manifest.tensors
    assert {spec.name: (spec.dtype, spec.shape) for spec in tensors} == expected_tensors(path, dtype)
    assert next(spec.dtype for spec in tensors if spec.name == BIAS) == "float32"


def test_what_is_pushed_is_what_is_saved(path: Path, tmp_path: Path) -> None:
    engine, before = make_engine(path), load_file(path / "model.safetensors")
    metrics = engine.sft_step(random_texts(1))
    pushed = dict(engine.named_weights())
    engine.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert pushed.keys() == saved.keys() == before.keys()
    assert all(torch.equal(pushed[name], saved[name]) for name in saved)
    moved = (saved[BIAS] - before[BIAS]).abs()
    assert float(moved.max()) == pytest.approx(RATE, rel=1e-4)
    assert not torch.equal(
        saved["model.layers.1.mlp.experts.3.up_proj.weight"],
        before["model.layers.1.mlp.experts.3.up_proj.weight"],
    )
    assert metrics["router/max_load"] > 1


def test_a_resumed_engine_has_the_biases_and_goes_on_bit_for_bit(path: Path, tmp_path: Path) -> None:
    engine = make_engine(path)
    engine.sft_step(random_texts(1))
    engine.save(tmp_path / "checkpoint")
    engine.saved()
    other = make_engine(path)
    other.load(tmp_path / "checkpoint")
    for each in (engine, other):
        each.sft_step(random_texts(2))
    ours, theirs = dict(engine.named_weights()), dict(other.named_weights())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_without_a_rate_leaves_the_biases(path: Path) -> None:
    engine = TrainEngine(path, "float32", OptimizerConfig(lr=1e-3), micro_batch_tokens=64, num_threads=1)
    before = dict(engine.named_weights())[BIAS].clone()
    engine.sft_step(random_texts(1))
    assert torch.equal(dict(engine.named_weights())[BIAS], before)
