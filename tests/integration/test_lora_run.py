"""A whole run that trains adapters: pushes of these alone, killed and gone on with, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from k2rl.models.hub import resolve_model
from k2rl.tracking.metrics import read_metrics
from k2rl.training.checkpoint import checkpoints
from k2rl.training.lora import ADAPTER_FOLDER
from tests.integration.conftest import Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 4
RUN = (
    *("train", "experiment=tiny", "seed=1", f"train.steps={STEPS}", "train.checkpoint_every=1"),
    *(
        "optimizer.lr=1e-2",
        "ptx.weight=1",
        "ptx.sequences_per_step=32",
        "lora.rank=4",
        "lora.target_modules=[q_proj,v_proj]",
    ),
)
TARGETS = ("q_proj.weight", "v_proj.weight")
#: Of `tiny-qwen3`: 3 layers, 128 numbers in, 128 (queries) and 64 (values) out, in float32.
ADAPTER_BYTES = 3 * 4 * ((128 + 128) + (128 + 64)) * 4


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_trains_adapters(start: Callable[..., Command], tmp_path: Path, workers: int) -> None:
    layout = (f"cluster.workers={workers}", f"inference.tensor_parallel={workers}")
    command = start(*RUN, *layout, cwd=tmp_path)
    outputs = tmp_path / "outputs" / "tiny"
    wait_for(lambda: any(len(checkpoints(run)) > 1 for run in outputs.glob("*")), "a checkpoint of a step")
    command.process.kill()
    command.finish()
    (run,) = outputs.iterdir()
    # Ray's own processes see it a while later.
    code, out, err = start("train", f"resume={run}", cwd=tmp_path).finish()
    assert code == 0, f"{out}\n{err}"

    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # A resumed run's first push, of everything, is before its first step.
    assert {row["publish/bytes"] for row in rows} == {ADAPTER_BYTES}
    assert all(row["mismatch/mean_abs_gap"] < 1e-4 for row in rows)
    assert rows[-1]["ptx/loss"] < rows[0]["ptx/loss"] - 0.2
    initial = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-qwen3"), dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    for (name, before), after in zip(initial.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(before, after) != name.endswith(TARGETS), name
    adapter = load_file(run / "model" / ADAPTER_FOLDER / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in adapter.values()) == ADAPTER_BYTES

    code, _, err = start("train", f"resume={run}", "lora.rank=8", "train.steps=9", cwd=tmp_path).finish()
    assert code == 2
    assert "was trained with lora.rank=4 lora.alpha=16" in err
