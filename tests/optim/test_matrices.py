"""Which matrices a parameter holds, on the models of transformers that fuse them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
)

from k2rl.config import OptimizerConfig
from k2rl.optim.matrices import boxes_of, is_muon_matrix
from k2rl.optim.muon import build_optimizer

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 20}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
DEEPSEEK = {**MLA, "first_k_dense_replace": 0, "n_routed_experts": 3, "n_group": 1, "topk_group": 1}


def model_of(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    ("config", "name", "shapes"),
    [
        (LlamaConfig(**SHAPE), "self_attn.q_proj.weight", [(16, 16)]),
        (Phi3Config(**SHAPE), "self_attn.qkv_proj.weight", [(16, 16), (8, 16), (8, 16)]),
        (Phi3Config(**SHAPE), "mlp.gate_up_proj.weight", [(20, 16), (20, 16)]),
        (Phi3Config(**SHAPE), "mlp.down_proj.weight", [(16, 20)]),
        (DeepseekV3Config(**SHAPE | EXPERTS | DEEPSEEK), "mlp.experts.gate_up_proj", [(20, 16)] * 6),
        (DeepseekV3Config(**SHAPE | EXPERTS | DEEPSEEK), "mlp.experts.down_proj", [(16, 20)] * 3),
        (DeepseekV3Config(**SHAPE | EXPERTS | DEEPSEEK), "self_attn.kv_b_proj.weight", [(32, 8)]),
        (GptOssConfig(**SHAPE | EXPERTS), "mlp.experts.gate_up_proj", [(16, 20)] * 6),
        (GptOssConfig(**SHAPE | EXPERTS), "mlp.experts.down_proj", [(20, 16)] * 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else None,
)
def test_fused_projections_are_so_many_matrices(
    config: PretrainedConfig, name: str, shapes: list[tuple[int, int]]
) -> None:
    model = model_of(config)
    name = f"model.layers.0.{name}"
    parameter = model.get_parameter(name)
    boxes = boxes_of(name, tuple(parameter.shape), model)
    assert [box.shape for box in boxes] == shapes
    assert is_muon_matrix(name, parameter)
    # Every element is in one of them, and in one only.
    count = torch.zeros(parameter.shape if parameter.ndim == 3 else (1, *parameter.shape))
    for box in boxes:
        rows, columns = torch.tensor(box.rows), torch.tensor(box.columns)
        count[box.expert][rows[:, None], columns] += 1
    assert bool((count == 1).all())


def test_gate_and_up_are_told_apart_as_the_model_does() -> None:
    """gpt-oss takes every other column, the rest the first and the second half of the rows."""
    model = model_of(GptOssConfig(**SHAPE | EXPERTS))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    gate, up = boxes_of(name, tuple(model.get_parameter(name).shape), model)[:2]
    assert (gate.columns, up.columns) == (range(0, 40, 2), range(1, 40, 2))
    gate, up = boxes_of("model.layers.0.mlp.experts.gate_up_proj", (3, 40, 16))[:2]
    assert (gate.rows, up.rows) == (range(20), range(20, 40))


def test_what_is_no_matrix_goes_to_adamw() -> None:
    model = model_of(GptOssConfig(**SHAPE | EXPERTS))
    muon = {name for name, parameter in model.named_parameters() if is_muon_matrix(name, parameter)}
    leaves = {name.removeprefix("model.layers.0.") for name in muon}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert leaves == attention | {"mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert not is_muon_matrix("conv.weight", torch.zeros(4, 1, 3))


def test_a_fused_parameter_moves_as_its_parts_would() -> None:
    generator = torch.Generator().manual_seed(0)
    config = OptimizerConfig(lr=0.1, weight_decay=0.1)
    name = "layers.0.mlp.experts.gate_up_proj"
    fused = nn.Parameter(torch.randn(3, 40, 16, generator=generator))
    parts = [nn.Parameter(part.clone()) for expert in fused.detach() for part in expert.chunk(2)]
    together = build_optimizer([(name, fused)], config, config.lr)
    apart = build_optimizer(
        [(f"{index}.weight", part) for index, part in enumerate(parts)], config, config.lr
    )
    for _ in range(3):
        fused.grad = torch.randn(fused.shape, generator=generator)
        for part, gradient in zip(parts, (g for e in fused.grad for g in e.chunk(2)), strict=True):
            part.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach().flatten(0, 1), torch.cat([part.detach() for part in parts]))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 rows do not divide"):
        boxes_of("mlp.gate_up_proj.weight", (7, 4))
