"""Every kind of model that vLLM is updated with: after an update it answers as if it had loaded the weights.

To the bit: the same tokens and the same log-probs as vLLM itself gives with the same weights from a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from k2rl.models.tiny import build_model, build_tokenizer
from tests.conftest import ROOT
from tests.integration.model_probe import FIRST, PROMPTS, SECOND

pytestmark = pytest.mark.integration

KINDS = ["tiny-qwen3", "tiny-llama-untied@bfloat16", "tiny-llama-untied", "tiny-deepseek"]
SECOND_WEIGHTS = ["replayed", "healed by a replay", "healed by loaders", "after sleep"]
#: Of each rank, in the probe.
CACHE_BYTES = 2**26


def _save(kind: str, folder: Path) -> None:
    """Two sets of weights: in the second, everything is moved by a good part of its own size."""
    name, _, dtype = kind.partition("@")
    model = build_model(name, build_tokenizer()).to(getattr(torch, dtype or "float32"))
    model.save_pretrained(folder / kind / FIRST)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                size = max(float(tensor.std()), 0.1)
                noise = 0.3 * size * torch.randn(tensor.shape, generator=generator)
                tensor.add_(noise.to(tensor.dtype))
    model.save_pretrained(folder / kind / SECOND)


def _probe(folder: Path, ranks: int, kinds: list[str]) -> dict[str, dict[str, Any]]:
    for kind in kinds:
        _save(kind, folder)
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.model_probe", str(folder), str(ranks), *kinds],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": binding},
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["kind"]: {**line, "folder": str(folder / line["kind"] / SECOND)} for line in lines}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return _probe(tmp_path_factory.mktemp("one"), 1, KINDS)


@pytest.mark.xdist_group("model kinds")
@pytest.mark.parametrize("kind", KINDS)
def test_an_updated_model_answers_as_a_fresh_one(kind: str, one_rank: dict[str, dict[str, Any]]) -> None:
    found = one_rank[kind]
    _check(found)
    if "@" not in kind:
        _check_against_transformers(found["fresh"], found["folder"])
    assert "model.norm.weight" in found["error of a replay"]
    assert "1.self_attn.o_proj.weight" in found["error while learning"]


@pytest.mark.slow
def test_each_of_two_ranks_takes_its_share(tmp_path: Path) -> None:
    for kind, found in _probe(tmp_path, 2, KINDS).items():
        _check(found)
        tensors = load_file(tmp_path / kind / SECOND / "model.safetensors").values()
        # As if of four bytes each, as `needed` counts.
        whole = sum(tensor.numel() * 4 for tensor in tensors)
        assert all(whole / 2 < needed < whole for needed in found["needed"])


@torch.no_grad()
def _check_against_transformers(answers: list[Any], folder: str) -> None:
    """Greedy tokens and their log-probs are those of a plain forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, (tokens, logprobs) in zip(PROMPTS, answers, strict=True):
        scores = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert scores.argmax(-1).tolist() == tokens
        for row, seen in zip(scores, logprobs, strict=True):
            for token, logprob in seen.items():
                assert abs(float(row[int(token)]) - logprob) < 1e-4


def _check(found: dict[str, Any]) -> None:
    answers = found["answers"]
    assert answers["learned"] != found["fresh"]  # else the rest would prove nothing
    assert answers["in boxes"] == answers["learned"]
    for step in SECOND_WEIGHTS:
        assert answers[step] == found["fresh"], step
    replayed = {step for step, ranks in found["replayed"].items() if all(ranks)}
    assert replayed == {"replayed", "in boxes", "healed by a replay", "after sleep"}
    assert all(given > 0.9 * CACHE_BYTES for given in found["bytes given back"])
    assert found["weights asleep"] == [0.0] * len(found["weights asleep"])
    assert not any(found["with loaders"])
    for (first, _), (last, _) in zip(found["asleep"][1], found["asleep"][-1], strict=True):
        assert last < 1.02 * first, "what is held asleep grows with every switch"
