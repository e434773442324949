"""Adapters alone are trained, and are saved as peft and transformers have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import random_groups, random_texts
from transformers import AutoModelForCausalLM

from k2rl.checkpoint_engine.publisher import expected_tensors
from k2rl.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from k2rl.errors import ConfigError
from k2rl.models.adapters import adapter_tensors
from k2rl.models.factors import is_factor
from k2rl.models.hub import resolve_model
from k2rl.training.engine import TrainEngine
from k2rl.training.lora import ADAPTER_FOLDER
from k2rl.training.saving import read_state

LORA = LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
SEQUENCES = [[1, 5, 9, 22, 13], [3, 4, 5, 6, 7, 8]]


def make_engine(path: Path, lora: LoraConfig = LORA, dtype: str = "float32", **options: Any) -> TrainEngine:
    optimizer = OptimizerConfig(lr=1e-2, **options)
    return TrainEngine(path, dtype, optimizer, micro_batch_tokens=64, num_threads=1, lora=lora)


def weights(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def logprobs(model: Any) -> list[list[float]]:
    """Of every token after the first, by a plain forward pass."""
    found = []
    for sequence in SEQUENCES:
        with torch.no_grad():
            logits = model(torch.tensor([sequence])).logits[0].float()
        chosen = torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(sequence)[1:, None])
        found.append(chosen[:, 0].tolist())
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_adapters_change_and_nothing_else(llama_path: Path, dtype: str, optimizer: str) -> None:
    engine = make_engine(llama_path, dtype=dtype, name=optimizer, weight_decay=0.1)
    before, first = weights(engine), engine.logprobs(SEQUENCES)
    losses = [engine.sft_step(random_texts(1))["loss"] for _ in range(4)]
    engine.policy_step(random_groups(1), objective=ObjectiveConfig(tau=0.2), temperature=1.0)
    after = weights(engine)
    assert losses == sorted(losses, reverse=True)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if is_factor(name)
    }
    assert {name for name in before if is_factor(name)} == {
        f"model.layers.{layer}.{module}.lora_{factor}.weight"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for factor in "AB"
    }
    base = AutoModelForCausalLM.from_pretrained(llama_path, dtype=getattr(torch, dtype))
    for name, parameter in base.named_parameters():
        assert torch.equal(after[name], parameter), name
    if dtype == "float32":
        # It begins as the model that it adapts.
        for mine, expected in zip(first, logprobs(base), strict=True):
            assert mine == pytest.approx(expected, abs=1e-5)
    assert {state for params in engine._optimizer.state.values() for state in params} == {
        *("step", "exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("targets", [[], ["q_b_proj", "kv_b_proj"]])
def test_routed_experts_stay_as_they_are(tmp_path: Path, targets: list[str]) -> None:
    path, lora = resolve_model("k2-mini"), LoraConfig(rank=4, alpha=8, target_modules=targets)
    engine = make_engine(path, lora)
    before = weights(engine)
    assert {name: tuple(weight.shape) for name, weight in before.items()} == {
        name: shape
        for tensors in (expected_tensors(path, "float32"), adapter_tensors(path, lora, "float32"))
        for name, (_, shape) in tensors.items()
    }
    # Each expert by itself, and routers' biases: no delta may bring them.
    assert engine.weights_source().frozen == set(expected_tensors(path, "float32"))
    for _ in range(2):  # the first one leaves A as it is: B is zero
        engine.sft_step(random_texts(1))
    after = weights(engine)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(
        adapter_tensors(path, lora, "float32")
    )
    engine.save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / ADAPTER_FOLDER)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for mine, theirs, saved in zip(
        engine.logprobs(SEQUENCES), logprobs(adapted), logprobs(merged), strict=True
    ):
        assert mine == pytest.approx(theirs, abs=1e-5)
        assert mine == pytest.approx(saved, abs=1e-5)


def test_what_is_named_as_experts_parts_are_gets_no_adapter() -> None:
    """Peft would adapt the experts instead."""
    lora = LoraConfig(rank=4, target_modules=["gate_proj"])
    with pytest.raises(ConfigError, match="names .gate_proj., but .* are: kv_a_proj_with_mqa, kv_b_proj"):
        adapter_tensors(resolve_model("k2-mini"), lora, "float32")


def test_state_is_that_of_the_adapters(llama_path: Path) -> None:
    """Masters, compute copies and moments of 4-rank factors; the model once, in the compute dtype."""
    engine = make_engine(llama_path, dtype="bfloat16")
    engine.sft_step(random_texts(1))
    factors = sum(master.numel() for _, master in engine._weights.named_masters())
    model = sum(tensor.numel() for name, tensor in engine.named_weights() if not is_factor(name))
    held = engine.state_bytes()
    assert held["parameters"] == 2 * model + (4 + 2) * factors
    assert held["gradients"] == 4 * factors
    assert held["optimizer"] - 8 * factors < 4 * 1024


def test_the_reference_of_a_kl_is_a_copy_of_the_adapters(llama_path: Path) -> None:
    engine = make_engine(llama_path)
    factors = sum(master.numel() for _, master in engine._weights.named_masters())
    before = engine.state_bytes()["parameters"]
    objective = ObjectiveConfig(tau=0.2, kl_weight=0.1)
    measured = [
        engine.policy_step(random_groups(1), objective=objective, temperature=1.0)["reference_kl"]
        for _ in range(2)
    ]
    assert engine.state_bytes()["parameters"] == before + 4 * factors
    assert abs(measured[0]) < 1e-6 < measured[1]


def test_a_saved_model_is_plain_and_its_adapter_is_pefts(llama_path: Path, tmp_path: Path) -> None:
    engine = make_engine(llama_path)
    for _ in range(3):
        engine.sft_step(random_texts(1))
    engine.save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.float32)
    assert engine.logprobs(SEQUENCES)[0] != pytest.approx(logprobs(base)[0], abs=1e-2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / ADAPTER_FOLDER)
    for model in (merged, adapted):
        for mine, expected in zip(engine.logprobs(SEQUENCES), logprobs(model), strict=True):
            assert mine == pytest.approx(expected, abs=1e-5)


def test_checkpoints_hold_adapters_and_are_gone_on_with(llama_path: Path, tmp_path: Path) -> None:
    engine = make_engine(llama_path)
    engine.sft_step(random_texts(1))
    engine.save(tmp_path / "saved")
    engine.saved()
    state = read_state(tmp_path / "saved")
    assert {name for name in state if ".lora_" not in name} == {"step_count", "rng"}
    engine.sft_step(random_texts(2))
    again = TrainEngine(llama_path, "float32", OptimizerConfig(lr=1e-2), 64, seed=5, num_threads=1, lora=LORA)
    again.load(tmp_path / "saved")
    again.sft_step(random_texts(2))
    after, expected = weights(again), weights(engine)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (LoraConfig(), "lora.rank=0"),
        (LoraConfig(4, 4, LORA.target_modules), "lora.alpha=4"),
        (LoraConfig(2, 8, LORA.target_modules), "lora.rank=2"),
        (LoraConfig(4, 8, ["q_proj"]), r"lora.target_modules=\[q_proj\]"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(
    llama_path: Path, tmp_path: Path, other: LoraConfig, said: str
) -> None:
    engine = make_engine(llama_path)
    engine.save(tmp_path / "saved")
    engine.saved()
    optimizer = OptimizerConfig(lr=1e-2)
    wrong = TrainEngine(
        llama_path, "float32", optimizer, 64, num_threads=1, lora=other if other.rank else None
    )
    trained = r"was trained with lora.rank=4 lora.alpha=8 lora.target_modules=\[down_proj,q_proj,v_proj\]"
    with pytest.raises(ConfigError, match=f"{trained}, not .*{said}"):
        wrong.load(tmp_path / "saved")
