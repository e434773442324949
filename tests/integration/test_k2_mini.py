"""Kimi K2 in miniature, from random weights by SFT and RL through the real vLLM: it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from k2rl.tracking.metrics import read_metrics
from tests.integration.conftest import Command

pytestmark = [pytest.mark.integration, pytest.mark.slow]


SHORT = ["warm_start.steps=12", "train.steps=2", "env.eval_tasks=8"]


@pytest.mark.parametrize(
    ("options", "gap"),
    [
        (["cluster.workers=2"], 1e-4),
        (["model.dtype=bfloat16", "inference.return_routed_experts=true"], 0.05),
    ],
    ids=["two ranks", "replayed experts"],
)
def test_the_trainer_computes_what_vllm_does(
    start: Callable[..., Command], tmp_path: Path, options: list[str], gap: float
) -> None:
    """vLLM starts with random weights: an expert that a push does not reach is seen."""
    code, out, err = start("train", "experiment=k2_mini", *SHORT, *options, cwd=tmp_path).finish()
    assert code == 0, f"{out}\n{err}"
    (run,) = tmp_path.glob("outputs/k2_mini/*")
    rows = read_metrics(run)
    assert len(rows) == 2
    for row in rows:
        assert row["mismatch/mean_abs_gap"] < gap
        assert ("mismatch/other_experts_share" in row) == ("return_routed" in str(options))
        assert row.get("mismatch/other_experts_share", 0.0) < 0.1


@pytest.mark.timeout(1200)
def test_reward_rises_on_held_out_tasks(start: Callable[..., Command], tmp_path: Path) -> None:
    code, out, err = start("train", "experiment=k2_mini", cwd=tmp_path).finish(1100)
    assert code == 0, f"{out}\n{err}"
    (run,) = tmp_path.glob("outputs/k2_mini/*")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rl_gain"]["ci95"][0] > 0
    assert summary["eval_after"]["reward"] > 0.65
    for row in read_metrics(run):
        assert row["mismatch/mean_abs_gap"] < 1e-4
        assert row["router/unused_share"] == 0
    weights = load_file(run / "model" / "model.safetensors")
    biases = {name: bias for name, bias in weights.items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 3
    assert all(bool(bias.any()) for bias in biases.values())
