"""QK-Clip on real models: what it does to every logit, what it leaves alone, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from k2rl.errors import ConfigError
from k2rl.models.logit_probe import LogitProbe
from k2rl.optim.qk_clip import QKClip
from k2rl.optim.qk_rules import head_rows
from tests import dense_attention

SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
LATENT = {
    **SHAPE,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "first_k_dense_replace": 2,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
}
MODELS = {
    "multi-head": LlamaConfig(**SHAPE),
    "multi-head, biased": LlamaConfig(**SHAPE, attention_bias=True),
    "multi-head, fused": Phi3Config(**SHAPE),
    "grouped": LlamaConfig(**GROUPED, head_dim=10),
    "grouped, biased": Qwen2Config(**GROUPED),
    "grouped, fused": Phi3Config(**GROUPED),
    "latent": DeepseekV3Config(**LATENT, q_lora_rank=8),
    "latent, whole queries": DeepseekV3Config(**LATENT, q_lora_rank=None),
}
TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]])


def build(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=dense_attention.NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.double().eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """[layers, heads, T, T] of one forward pass."""
    dense_attention.LOGITS.clear()
    model(input_ids=TOKENS, use_cache=False)
    return torch.stack([logits for _, logits in dense_attention.LOGITS])


@pytest.mark.parametrize("name", MODELS)
def test_a_clipped_heads_logits_scale_by_gamma_and_others_keep_their_bits(name: str) -> None:
    config = MODELS[name]
    model = build(config)
    before = logits(model)
    maxima = before.flatten(2).amax(-1).float()
    threshold = float(maxima[0].median())  # lies on a head: that one, the smaller and the later layer stay
    assert threshold > 0
    parameters = dict(model.named_parameters())
    clip = QKClip(head_rows(parameters, config), parameters, 4, threshold)
    maxima[1] = 0.0  # as if the second layer had stayed small: its weights are to keep their bits
    second = {n: p.clone() for n, p in model.named_parameters() if ".layers.1." in n}
    metrics = clip.clip(maxima)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in second.items())
    after = logits(model)
    gamma = torch.div(torch.tensor(threshold), maxima[0].double()).clamp(max=1)
    assert 0 < int((gamma < 1).sum()) < 4
    for head in range(4):
        if gamma[head] < 1:
            torch.testing.assert_close(after[0, head], before[0, head] * gamma[head], rtol=1e-6, atol=0)
        else:
            assert torch.equal(after[0, head], before[0, head])
    assert float(after[0].max()) <= threshold * (1 + 1e-6)  # the next forward pass, where no step was taken
    assert metrics["qk_clip/clipped_share"] == float((gamma < 1).sum()) / 8
    assert metrics["qk_clip/max_logit"] == metrics["qk_clip/layer_0/max_logit"] == float(maxima.max())
    assert metrics["qk_clip/layer_0/mean_logit"] == pytest.approx(float(maxima[0].mean()))


@pytest.mark.parametrize("name", ["latent", "grouped"])
def test_keys_that_heads_share_stay(name: str) -> None:
    model = build(MODELS[name])
    parameters = dict(model.named_parameters())
    shared = "kv_a_proj_with_mqa" if name == "latent" else "k_proj"
    before = {n: p.detach().clone() for n, p in parameters.items() if shared in n}
    QKClip(head_rows(parameters, MODELS[name]), parameters, 4, 1e-3).clip(torch.ones(2, 4))
    assert before
    assert all(torch.equal(parameters[n], value) for n, value in before.items())


def test_heads_that_saw_nothing_or_only_negative_logits_stay() -> None:
    model = build(MODELS["multi-head"])
    parameters = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    maxima = torch.tensor([[-torch.inf, -500.0, 0.0, 1.0]] * 2)
    metrics = QKClip(head_rows(parameters, MODELS["multi-head"]), parameters, 4, 1.0).clip(maxima)
    assert metrics["qk_clip/clipped_share"] == 0
    assert all(torch.equal(parameters[n], value) for n, value in before.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Qwen3Config(**GROUPED, head_dim=8), r"qwen3: it normalises .* \(k_norm, q_norm\).*qk_clip=0"),
        (Olmo2Config(**SHAPE), r"olmo2: it normalises .* \(k_norm, q_norm\)"),
        (GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2), r"gpt_oss: the heads of .* are not known"),
    ],
)
def test_attention_that_undoes_the_clip_or_is_unknown_is_refused(
    config: PretrainedConfig, message: str
) -> None:
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    with pytest.raises(ConfigError, match=message) as refusal:
        head_rows(names, config)
    assert "\n" not in str(refusal.value)


def test_a_layer_with_another_name_and_a_switch_are_refused() -> None:
    config = SimpleNamespace(model_type="odd", num_hidden_layers=1, num_attention_heads=1, hidden_size=4)
    with pytest.raises(ConfigError, match="odd: its attention layers"):
        head_rows(["transformer.h.0.attn.c_attn.weight"], config)
    config.use_qk_norm = True
    with pytest.raises(ConfigError, match="use_qk_norm"):
        head_rows([f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"], config)


def test_weights_that_are_not_trained_or_too_short_are_refused() -> None:
    model = build(MODELS["multi-head"])
    parameters = dict(model.named_parameters())
    rules = head_rows(parameters, MODELS["multi-head"])
    with pytest.raises(ConfigError, match="too few for 5 heads"):
        QKClip(rules, parameters, 5, 1.0)
    del parameters["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj\.weight, which is not trained"):
        QKClip(rules, parameters, 4, 1.0)


def test_the_probe_keeps_the_largest_and_forgets_when_asked() -> None:
    probe = LogitProbe(2, 3)
    layer = SimpleNamespace(layer_idx=1)
    probe.record(layer, torch.tensor([1.0, -2.0, 3.0]))  # type: ignore[arg-type]
    probe.record(layer, torch.tensor([0.0, -1.0, 5.0]))  # type: ignore[arg-type]
    assert probe.take().tolist() == [[-torch.inf] * 3, [1.0, -1.0, 5.0]]
    assert probe.take().tolist() == [[-torch.inf] * 3] * 2
