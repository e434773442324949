"""Published models as manifests, computed from the figures of their `config.json`. Imports no torch.

Names, shapes and dtypes are those of the released checkpoints, multi-token-prediction layers included. FP8 is
the block-scaled form: a float32 scale for each 128 x 128 block of a linear weight, in one unit with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec

Dtype = Literal["fp8", "bf16"]

DTYPES: tuple[Dtype, ...] = ("fp8", "bf16")
#: Rows and columns that share one FP8 scale.
SCALE_BLOCK = 128


class Architecture(msgspec.Struct, frozen=True):
    """A transformer with mixture-of-experts layers; lengths as in its `config.json`."""

    hidden: int
    layers: int
    dense_layers: int
    dense_width: int
    experts: int
    #: Of them, those that a token is given to.
    active_experts: int
    expert_width: int
    shared_experts: int
    heads: int
    vocab: int
    #: Tensor-parallel ranks of an inference replica, as in the published deployments.
    tp: int
    #: Parameters without the multi-token-prediction layer, as published.
    published: float
    kv_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False
    router_bias: bool = True
    #: Latent attention (MLA), where above 0.
    q_rank: int = 0
    kv_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    #: Layers for multi-token prediction that the checkpoint carries after the others.
    mtp_layers: int = 0


ARCHITECTURES = {
    # 1,026.5e9 is what the model's page on Hugging Face counts; the report rounds to 1.04T.
    "kimi_k2": Architecture(
        hidden=7168, layers=61, dense_layers=1, dense_width=18432, experts=384, active_experts=8,
        expert_width=2048, shared_experts=1, heads=64, vocab=163840, tp=16, published=1026.5e9,
        q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128,
    ),
    "deepseek_v31": Architecture(
        hidden=7168, layers=61, dense_layers=3, dense_width=18432, experts=256, active_experts=8,
        expert_width=2048, shared_experts=1, heads=128, vocab=129280, tp=16, published=671e9,
        q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, mtp_layers=1,
    ),
    "qwen3_235b_a22b": Architecture(
        hidden=4096, layers=94, dense_layers=0, dense_width=12288, experts=128, active_experts=8,
        expert_width=1536, shared_experts=0, heads=64, vocab=151936, tp=8, published=235e9,
        kv_heads=4, head_dim=128, qk_norm=True, router_bias=False,
    ),
    "glm_4_5_air": Architecture(
        hidden=4096, layers=46, dense_layers=1, dense_width=10944, experts=128, active_experts=8,
        expert_width=1408, shared_experts=1, heads=96, vocab=151552, tp=8, published=106e9,
        kv_heads=8, head_dim=128, qkv_bias=True, mtp_layers=1,
    ),
}  # fmt: skip


def parameters(model: Architecture, mtp: bool = False) -> int:
    """Number of parameters, scales not counted."""
    return sum(math.prod(spec.shape) for spec in tensors(model, "bf16", mtp))


def active_parameters(model: Architecture) -> int:
    """Parameters that one token is computed with: all but those of the experts that it is not given to."""
    idle = (model.layers - model.dense_layers) * (model.experts - model.active_experts)
    return parameters(model) - idle * 3 * model.hidden * model.expert_width


def tensors(model: Architecture, dtype: Dtype, mtp: bool = True) -> list[TensorSpec]:
    """All tensors of the checkpoint, layer by layer."""
    specs = [_plain("model.embed_tokens.weight", model.vocab, model.hidden)]
    for layer in range(model.layers + (model.mtp_layers if mtp else 0)):
        prefix = f"model.layers.{layer}."
        specs += _attention(model, dtype, prefix)
        specs += _mlp(model, dtype, prefix, dense=layer < model.dense_layers)
        norms = ("input_layernorm", "post_attention_layernorm")
        specs += [_plain(f"{prefix}{norm}.weight", model.hidden) for norm in norms]
        if layer >= model.layers:
            specs += _mtp(model, prefix)
    specs.append(_plain("model.norm.weight", model.hidden))
    specs.append(_plain("lm_head.weight", model.vocab, model.hidden))
    return specs


def manifest(specs: list[TensorSpec], owners: int) -> Manifest:
    """Whole tensors (units, where they must travel together) dealt one by one to `owners` trainer ranks.

    So every stretch of the model is held by many ranks, as with FSDP and expert parallelism. A real trainer
    also cuts tensors; how finely changes the number of copies, not the bytes that a rank sends.
    """
    # Turned by the golden section after each time around, lest experts that recur in every layer at the same
    # distance always fall to the same owners.
    turn = round(owners * 0.618)
    units: dict[str, int] = {}
    shards = []
    for index, spec in enumerate(specs):
        number = units.setdefault(spec.unit or spec.name, len(units))
        shards.append(Shard(index, (number + number // owners * turn) % owners, 0, spec.rows))
    return Manifest(tuple(specs), tuple(shards))


def _attention(model: Architecture, dtype: Dtype, prefix: str) -> Iterator[TensorSpec]:
    at = f"{prefix}self_attn."
    if model.kv_rank:
        yield from _linear(f"{at}q_a_proj", model.q_rank, model.hidden, dtype)
        yield _plain(f"{at}q_a_layernorm.weight", model.q_rank)
        yield from _linear(
            f"{at}q_b_proj", model.heads * (model.nope_dim + model.rope_dim), model.q_rank, dtype
        )
        yield from _linear(f"{at}kv_a_proj_with_mqa", model.kv_rank + model.rope_dim, model.hidden, dtype)
        yield _plain(f"{at}kv_a_layernorm.weight", model.kv_rank)
        yield from _linear(
            f"{at}kv_b_proj", model.heads * (model.nope_dim + model.value_dim), model.kv_rank, dtype
        )
        yield from _linear(f"{at}o_proj", model.hidden, model.heads * model.value_dim, dtype)
        return
    for name, heads in (("q", model.heads), ("k", model.kv_heads), ("v", model.kv_heads)):
        yield from _linear(f"{at}{name}_proj", heads * model.head_dim, model.hidden, dtype)
        if model.qkv_bias:
            yield _plain(f"{at}{name}_proj.bias", heads * model.head_dim)
    yield from _linear(f"{at}o_proj", model.hidden, model.heads * model.head_dim, dtype)
    if model.qk_norm:
        yield _plain(f"{at}q_norm.weight", model.head_dim)
        yield _plain(f"{at}k_norm.weight", model.head_dim)


def _mlp(model: Architecture, dtype: Dtype, prefix: str, dense: bool) -> Iterator[TensorSpec]:
    at = f"{prefix}mlp."
    if dense:
        yield from _gated(at, model.hidden, model.dense_width, dtype)
        return
    yield _plain(f"{at}gate.weight", model.experts, model.hidden)
    if model.router_bias:
        yield TensorSpec(f"{at}gate.e_score_correction_bias", "float32", (model.experts,))
    for expert in range(model.experts):
        yield from _gated(f"{at}experts.{expert}.", model.hidden, model.expert_width, dtype)
    if model.shared_experts:
        width = model.expert_width * model.shared_experts
        yield from _gated(f"{at}shared_experts.", model.hidden, width, dtype)


def _gated(prefix: str, hidden: int, width: int, dtype: Dtype) -> Iterator[TensorSpec]:
    yield from _linear(f"{prefix}gate_proj", width, hidden, dtype)
    yield from _linear(f"{prefix}up_proj", width, hidden, dtype)
    yield from _linear(f"{prefix}down_proj", hidden, width, dtype)


def _mtp(model: Architecture, prefix: str) -> Iterator[TensorSpec]:
    """What a prediction layer has beside a decoder layer: its own copy of embedding and head among it."""
    yield _plain(f"{prefix}embed_tokens.weight", model.vocab, model.hidden)
    yield _plain(f"{prefix}eh_proj.weight", model.hidden, 2 * model.hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield _plain(f"{prefix}{name}.weight", model.hidden)
    yield _plain(f"{prefix}shared_head.head.weight", model.vocab, model.hidden)


def _linear(name: str, out: int, width: int, dtype: Dtype) -> Iterator[TensorSpec]:
    if dtype == "bf16":
        yield _plain(f"{name}.weight", out, width)
        return
    scales = (-(-out // SCALE_BLOCK), -(-width // SCALE_BLOCK))
    yield TensorSpec(f"{name}.weight", "float8_e4m3fn", (out, width), unit=name)
    yield TensorSpec(f"{name}.weight_scale_inv", "float32", scales, unit=name)


def _plain(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "bfloat16", shape)
