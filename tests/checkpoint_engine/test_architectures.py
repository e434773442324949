"""Published models as manifests: parameter totals, dtypes, owners and what each rank needs."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from k2rl.checkpoint_engine.architectures import (
    ARCHITECTURES,
    DTYPES,
    active_parameters,
    manifest,
    parameters,
    tensors,
)
from k2rl.checkpoint_engine.sharding import Layout

#: With the multi-token-prediction layer, as the models' pages on Hugging Face count.
WHOLE_CHECKPOINTS = {
    "kimi_k2": 1026.5e9,
    "deepseek_v31": 685e9,
    "qwen3_235b_a22b": 235e9,
    "glm_4_5_air": 110e9,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_totals_are_within_1_percent_of_the_published_ones(name: str) -> None:
    model = ARCHITECTURES[name]
    assert parameters(model) == pytest.approx(model.published, rel=0.01)
    assert parameters(model, mtp=True) == pytest.approx(WHOLE_CHECKPOINTS[name], rel=0.01)


#: Billions, as the models' reports say.
ACTIVE = {"kimi_k2": 32.6, "deepseek_v31": 37, "qwen3_235b_a22b": 22, "glm_4_5_air": 12}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_active_parameters_are_the_published_ones(name: str) -> None:
    """Reports count embeddings or leave them out; K2's, to the digit that it gives, is within 1 percent."""
    rel = 0.01 if name == "kimi_k2" else 0.1
    assert active_parameters(ARCHITECTURES[name]) == pytest.approx(1e9 * ACTIVE[name], rel=rel)


def test_k2_is_a_terabyte_in_fp8_and_two_in_bf16() -> None:
    model = ARCHITECTURES["kimi_k2"]
    fp8, bf16 = (sum(spec.nbytes for spec in tensors(model, dtype)) for dtype in DTYPES)
    assert fp8 == pytest.approx(1.03e12, rel=0.01)
    assert bf16 == pytest.approx(2.06e12, rel=0.01)


def test_every_row_has_one_owner_and_owners_hold_alike() -> None:
    specs = tensors(ARCHITECTURES["glm_4_5_air"], "fp8")
    weights = manifest(specs, 16)
    weights.check()
    assert len(weights.shards) == len(specs)
    held = [0] * 16
    for shard in weights.shards:
        held[shard.owner] += specs[shard.tensor].nbytes
    assert max(held) < 1.4 * sum(held) / 16
    owner_of = {specs[shard.tensor].name: shard.owner for shard in weights.shards}
    scales = [name for name in owner_of if name.endswith("_scale_inv")]
    assert all(owner_of[name] == owner_of[name.removesuffix("_scale_inv")] for name in scales)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (8, 1), (16, 1), (16, 16), (16, 4)])
def test_the_ranks_of_a_replica_need_every_byte_between_them(tp: int, ep: int) -> None:
    model = ARCHITECTURES["kimi_k2"]
    layout = Layout(tp, ep, model.experts)
    layer = [spec for spec in tensors(model, "fp8") if ".layers.7." in spec.name]
    for spec in layer:
        boxes = [layout.box(spec, rank) for rank in range(tp)]
        held = {box for box in boxes if box is not None}
        assert held, spec.name
        for dimension, length in enumerate(spec.shape):
            edges = sorted({box[dimension] for box in held})
            assert edges[0][0] == 0
            assert edges[-1][1] == length
            assert all(after[0] <= before[1] for before, after in pairwise(edges))


def test_ranks_need_a_share_each_and_replicate_little() -> None:
    model = ARCHITECTURES["kimi_k2"]
    specs = [spec for spec in tensors(model, "fp8") if ".layers.7." in spec.name]
    for layout in (Layout(16), Layout(16, 16, model.experts)):
        for rank in (0, 9):
            needs = layout.needs(specs, rank)
            nbytes = sum(
                math.prod(stop - start for start, stop in needs[spec.name][0])
                * spec.nbytes
                // math.prod(spec.shape)
                for spec in specs
                if spec.name in needs
            )
            assert nbytes == pytest.approx(sum(spec.nbytes for spec in specs) / 16, rel=0.05)


def test_fewer_key_heads_than_ranks_are_replicated() -> None:
    model = ARCHITECTURES["qwen3_235b_a22b"]
    layout = Layout(8, kv_heads=model.kv_heads)
    key = next(spec for spec in tensors(model, "bf16") if spec.name.endswith("0.self_attn.k_proj.weight"))
    assert layout.box(key, 0) == layout.box(key, 1) == ((0, 128), (0, 4096))
    assert layout.box(key, 7) == ((384, 512), (0, 4096))
