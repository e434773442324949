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
