"""The benchmark for GPUs runs where torch and transformers are, and little else; here on a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import runpy, sys
absent = "hydra msgspec omegaconf peft psutil pydantic ray redis rich vllm aiohttp accelerate"
sys.modules.update(dict.fromkeys(absent.split()))  # as if they were not installed
sys.argv = ["gpu.py", *sys.argv[1:]]
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


@pytest.mark.slow
def test_all_parts_run_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--device", "cpu", "--small", "--rounds", "1", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [*dict.fromkeys(row["part"] for row in rows)] == [
        *("ceilings", "muon", "choice", "probe", "logprobs", "step")
    ]
    errors = {
        (row["what"], name): value
        for row in rows
        for name, value in row.items()
        if name.startswith(("largest logits", "output", "gradient", "updates", "k2rl from", "log-probs"))
    }
    assert len(errors) > 20
    assert [name for name, value in errors.items() if not math.isfinite(value) or value > 0.05] == []
