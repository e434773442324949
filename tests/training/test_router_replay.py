"""Experts chosen elsewhere, replayed in the trainer: against a model that calls each expert by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_groups
from torch import Tensor
from transformers import AutoModelForCausalLM

from k2rl.config import ObjectiveConfig, OptimizerConfig
from k2rl.models.hub import resolve_model
from k2rl.training.batch import TrainSequence
from k2rl.training.engine import TrainEngine
from k2rl.training.packing import pack

LAYERS, EXPERTS, CHOSEN, DENSE = 3, 8, 2, 1


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model("tiny-deepseek")


def routed(groups: Sequence[Sequence[TrainSequence]], known: int = 10**6) -> list[list[TrainSequence]]:
    """With experts for the first `known` positions that depend on the tokens before, as a model's do."""

    def routes(tokens: Sequence[int]) -> list[bytes]:
        rows = []
        for end in range(1, min(len(tokens), known + 1)):
            rng = random.Random(str(tokens[:end]))
            row = [0] * CHOSEN * DENSE + [
                e for _ in range(DENSE, LAYERS) for e in rng.sample(range(EXPERTS), 2)
            ]
            rows.append(torch.tensor(row, dtype=torch.uint16).numpy().tobytes())
        return rows

    return [[replace(s, routes=tuple(routes(s.token_ids))) for s in group] for group in groups]


def numbers(routes: Sequence[bytes]) -> Tensor:
    rows = torch.frombuffer(bytearray(b"".join(routes)), dtype=torch.uint16).to(torch.int64)
    return rows.view(len(routes), LAYERS, CHOSEN)


def reference(path: Path, sequence: TrainSequence) -> list[float]:
    """Log-probs of the sampled tokens by transformers' own forward pass, each expert called by hand."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    told = numbers(sequence.routes)
    for layer in range(DENSE, LAYERS):
        moe = model.model.layers[layer].mlp

        def forward(hidden: Tensor, moe: Any = moe, layer: int = layer) -> Tensor:
            out = moe.shared_experts(hidden)
            for position, row in enumerate(hidden[0]):
                logits = moe.gate.weight @ row
                own = (logits.sigmoid() + moe.gate.e_score_correction_bias).topk(CHOSEN).indices
                chosen = told[position, layer] if position < len(told) else own
                weights = logits.sigmoid()[chosen]
                weights = weights / (weights.sum() + 1e-20) if moe.gate.norm_topk_prob else weights
                for expert, weight in zip(
                    chosen.tolist(), weights * moe.gate.routed_scaling_factor, strict=True
                ):
                    gate, up = (moe.experts.gate_up_proj[expert] @ row).chunk(2)
                    part = moe.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                    out[0, position] += weight * part
            return out

        moe.forward = forward
    with torch.no_grad():
        logprobs = model(torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1)
    return [
        float(logprobs[index - 1, token])
        for index, (token, sampled) in enumerate(zip(sequence.token_ids, sequence.sampled_mask, strict=True))
        if sampled
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_computes_with_the_experts_it_is_told(path: Path, checkpointing: bool) -> None:
    """Some are told of all positions, some of the first three."""
    plain = random_groups(3, groups=2, size=2)
    groups = [*routed(plain[:1]), *routed(plain[1:], known=3)]
    # Behaviour as the reference has it: what is measured is the difference to that.
    groups = [[replace(s, behaviour_logprobs=tuple(reference(path, s))) for s in group] for group in groups]
    engine = TrainEngine(
        path,
        "float32",
        OptimizerConfig(name="adamw", lr=1e-3),
        micro_batch_tokens=40,
        num_threads=1,
        activation_checkpointing=checkpointing,
    )
    learned = engine.policy_step(groups, objective=ObjectiveConfig(), temperature=1.0)
    assert learned["logprob_gap_max"] < 2e-5
    assert 0.5 < learned["other_experts_share"] < 1
    # Nothing is left over for those that are told nothing.
    free = [[replace(s, routes=()) for s in group] for group in groups]
    again = engine.policy_step(free, objective=ObjectiveConfig(), temperature=1.0)
    assert "other_experts_share" not in again
    assert again["logprob_gap_max"] > 0.01


def test_packed_positions_keep_their_experts() -> None:
    groups = routed(random_groups(5, groups=2, size=3))
    unknown = [
        replace(
            groups[0][0],
            token_ids=(9, 8, 7, 6),
            sampled_mask=(False, True, True, True),
            routes=(),
            behaviour_logprobs=(0.0,) * 3,
        )
    ]
    (batch,) = pack([*groups, unknown], 1000)
    assert batch.routes is not None
    told = {tuple(s.token_ids[: i + 1]): row for g in groups for s in g for i, row in enumerate(s.routes)}
    ancestors: list[int] = []
    for token, depth, row in zip(
        batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), batch.routes, strict=True
    ):
        ancestors = [*ancestors[:depth], token]
        expected = told.get(tuple(ancestors))
        if expected is None:
            assert ancestors == [9, 8, 7][: depth + 1]
            assert (row == -1).all()
        else:
            assert torch.equal(row, numbers([expected]).flatten())
    assert pack([unknown], 1000)[0].routes is None
