"""QK-Clip in the train engine: what the probe sees, what a step does, and that two ranks do the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_host import RankHosts
from tiny_models import random_groups, random_texts, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.errors import ConfigError
from k2rl.training.engine import TrainEngine
from k2rl.training.ranks import ALONE, Ranks
from k2rl.training.sharding import local
from tests import dense_attention

OBJECTIVE = ObjectiveConfig(tau=0.2)
LAYERS, HEADS = 2, 4


@pytest.fixture(scope="module")
def hosts() -> Iterator[RankHosts]:
    both = RankHosts(2)
    yield both
    both.close()


@pytest.fixture(scope="module", params=["grouped", "latent"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model("llama", tmp_path_factory.mktemp(request.param))
    if request.param == "latent":
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 8}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS}
        latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        rest = {"v_head_dim": 6, "first_k_dense_replace": 1, "initializer_range": 0.3, "pad_token_id": 2}
        config = DeepseekV3Config(**sizes, **heads, **latent, **experts, **rest)
        DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_engine(path: Path, tau: float, ranks: Ranks = ALONE, lr: float = 1e-2) -> TrainEngine:
    optimizer = OptimizerConfig(lr=lr, qk_clip=tau)
    return TrainEngine(path, "float32", optimizer, micro_batch_tokens=48, num_threads=1, ranks=ranks)


@torch.no_grad()
def dense_maxima(engine: TrainEngine, folder: Path) -> Tensor:
    """[layers, heads] of the batch below under the engine's weights, each sequence alone."""
    engine.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=dense_attention.NAME)
    dense_attention.LOGITS.clear()
    for sequence in [*(member for group in random_groups(3) for member in group), *random_texts(4)]:
        last = max(index for index, label in enumerate(sequence.label_mask) if label)  # it predicts nothing
        model(input_ids=torch.tensor([sequence.token_ids[:last]]), use_cache=False)
    seen = [(layer, logits.amax(dim=(1, 2))) for layer, logits in dense_attention.LOGITS]
    return torch.stack(
        [torch.stack([maxima for at, maxima in seen if at == layer]).amax(0) for layer in range(LAYERS)]
    )


def step(engine: TrainEngine, updates: int = 1) -> dict[str, float]:
    texts = {"ptx_sequences": random_texts(4), "ptx_weight": 0.1}
    return engine.policy_step(
        random_groups(3), objective=OBJECTIVE, temperature=1.0, updates=updates, **texts
    )


def weights(engine: TrainEngine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def test_the_step_clips_what_the_forward_passes_showed(path: Path, tmp_path: Path) -> None:
    engine = make_engine(path, tau=1e9)
    start = dense_maxima(engine, tmp_path / "start")
    tau = float(start.flatten().sort().values[3:5].mean())  # half of the heads
    assert tau > 0
    seen = step(engine)
    assert seen["qk_clip/max_logit"] == pytest.approx(float(start.max()), rel=1e-5)
    assert seen["qk_clip/mean_logit"] == pytest.approx(float(start.mean()), rel=1e-5)
    assert [seen[f"qk_clip/layer_{layer}/max_logit"] for layer in range(LAYERS)] == pytest.approx(
        start.amax(1).tolist(), rel=1e-5
    )
    assert seen["qk_clip/clipped_share"] == 0
    moved = dense_maxima(engine, tmp_path / "moved")

    clipped = make_engine(path, tau)
    assert step(clipped)["qk_clip/clipped_share"] == 0.5
    # The first layer reads what no clip has changed: its logits are gamma times those of the step alone.
    after = dense_maxima(clipped, tmp_path / "after")
    gamma = (tau / start[0]).clamp(max=1)
    torch.testing.assert_close(after[0], torch.where(start[0] > tau, gamma * moved[0], moved[0]))
    assert bool((after[0] <= tau + (moved[0] - start[0]).abs() + 1e-5)[start[0] > tau].all())


def test_without_a_threshold_nothing_is_measured_or_changed(path: Path) -> None:
    plain, unreached = make_engine(path, tau=0.0), make_engine(path, tau=1e9)
    assert not [name for name in step(plain) if name.startswith("qk_clip")]
    step(unreached)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(unreached)[name]), name


def test_passes_without_a_gradient_are_not_measured(path: Path) -> None:
    engine = make_engine(path, tau=1e9)
    engine.logprobs([list(range(3, 60))])
    assert engine._probe is not None
    assert bool(torch.isinf(engine._probe.take()).all())


def test_logits_stay_near_the_threshold_over_many_updates(path: Path, tmp_path: Path) -> None:
    engine = make_engine(path, tau=0.5, lr=1e-3)
    for _ in range(6):
        last = step(engine, updates=2)
    assert last["qk_clip/max_logit"] < 0.6
    assert float(dense_maxima(engine, tmp_path / "end").max()) < 0.6


def clipped_training(ranks: Ranks, path: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    engine = make_engine(path, tau=1.0, ranks=ranks)
    metrics = [step(engine, updates=2), step(engine)]
    # One text: a rank has nothing but what fills its batch up.
    metrics.append(engine.sft_step(random_texts(7, count=1)))
    wholes = {}
    for name, master in engine._weights.named_masters():
        full = master.full_tensor() if ranks.world > 1 else local(master)
        wholes[name] = full.detach().numpy().copy()
    engine.close()
    return metrics, wholes


def test_two_ranks_clip_as_one(hosts: RankHosts, path: Path) -> None:
    alone, expected = clipped_training(ALONE, path)
    assert all(0 < row["qk_clip/clipped_share"] < 1 for row in alone[:1])
    for metrics, masters in hosts.run(clipped_training, path):
        for mine, theirs in zip(metrics, alone, strict=True):
            assert {key: mine[key] for key in mine if key.startswith("qk_clip")} == pytest.approx(
                {key: theirs[key] for key in theirs if key.startswith("qk_clip")}, rel=1e-3
            )
        for name, master in masters.items():
            torch.testing.assert_close(
                torch.from_numpy(master), torch.from_numpy(expected[name]), rtol=1e-3, atol=1e-4
            )


def test_a_model_with_query_key_norms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3: it normalises"):
        make_engine(save_model("qwen3", tmp_path), tau=100.0)
