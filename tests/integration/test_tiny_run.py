"""A whole run through real Ray and real vLLM: what it leaves behind, and what can be done with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from k2rl.evaluation.results import EvaluationResult
from k2rl.tracking import phases
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.timeline import read_timeline
from tests.integration.conftest import STEPS, Command

# One command serves all of these, so they belong to one test process.
pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("tiny_run")]


def test_summary_has_what_is_promised(tiny_run: Path) -> None:
    summary = json.loads((tiny_run / "summary.json").read_text())
    for name in ("eval_before", "eval_after"):
        assert summary[name]["n"] == 8
        low, high = summary[name]["ci95"]
        assert low <= summary[name]["reward"] <= high
    assert summary["steps"] == STEPS
    assert summary["wall_seconds"] > 0
    assert summary["samples_per_second"] > 0
    assert summary["failed_episodes"] == 0


MULTIRUN = "k2rl train --multirun experiment=tiny seed=1,2"
"""As the README has it."""


@pytest.mark.slow
def test_each_job_of_a_multirun_has_a_folder_of_its_own(
    start: Callable[..., Command], tmp_path: Path
) -> None:
    code, out, err = start(*MULTIRUN.split()[1:], cwd=tmp_path).finish()
    assert code == 0, f"{out}\n{err}"
    (sweep,) = (tmp_path / "outputs" / "tiny").iterdir()
    runs = sorted(path for path in sweep.iterdir() if path.is_dir())
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    assert [(summary["seed"], summary["steps"]) for summary in summaries] == [(1, 2), (2, 2)]
    assert all((run / "model" / "model.safetensors").stat().st_size > 0 for run in runs)


def test_run_leaves_its_files(tiny_run: Path) -> None:
    for name in (
        "metrics.jsonl",
        "report.html",
        "config.yaml",
        "logs/worker-0.log",
        "samples/step_000001.txt",
    ):
        assert (tiny_run / name).stat().st_size > 0, name
    assert list((tiny_run / "tensorboard").iterdir())


def test_every_phase_is_one_that_the_report_knows(tiny_run: Path) -> None:
    assert {phase.phase for phase in read_timeline(tiny_run)} == set(phases.ALL) - {
        phases.LOAD,
        phases.WARM_START,
    }


def test_trainer_and_vllm_agree_in_float32(tiny_run: Path) -> None:
    rows = read_metrics(tiny_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["mismatch/mean_abs_gap"] < 1e-4
        assert abs(row["mismatch/ratio_max"] - 1) < 1e-2


def test_vllm_gives_its_memory_to_the_trainer(tiny_run: Path) -> None:
    for row in read_metrics(tiny_run):
        held, base = row["memory/vllm_while_training_gib"], row["memory/vllm_without_model_gib"]
        # Little of the cache was used; code that has run since is a part of what is held.
        assert base < held < 1.25 * base
        assert row["memory/to_training_s"] > 0
        assert row["memory/trainer_while_serving_gib"] > 0


def test_every_token_knows_its_weight_version(tiny_run: Path) -> None:
    after = msgspec.json.decode((tiny_run / "evaluations" / "after.json").read_bytes(), type=EvaluationResult)
    before = msgspec.json.decode(
        (tiny_run / "evaluations" / "before.json").read_bytes(), type=EvaluationResult
    )
    for result, version in ((before, 0), (after, STEPS)):
        for trajectory in result.examples:
            sampled = [
                v for v, s in zip(trajectory.weight_versions, trajectory.sampled_mask, strict=True) if s
            ]
            assert sampled
            assert set(sampled) == {version}


def test_saved_model_loads_in_transformers_and_has_learned(tiny_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from k2rl.models.hub import resolve_model

    trained = AutoModelForCausalLM.from_pretrained(tiny_run / "model", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-qwen3"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    assert tokenizer.chat_template
    changed = [
        name
        for (name, new), old in zip(trained.named_parameters(), initial.parameters(), strict=True)
        if not torch.equal(new, old)
    ]
    assert len(changed) == len(list(trained.parameters()))


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**27)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
    print("RESULT", json.dumps([
        [(token, at[token].logprob) for token, at in zip(part.token_ids, part.logprobs, strict=True)]
        for part in (output.outputs[0] for output in outputs)
    ]))
"""


@pytest.mark.slow
def test_saved_model_serves_in_plain_vllm_as_in_transformers(tiny_run: Path, tmp_path: Path) -> None:
    """Nothing of ours is between the folder and either of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "model")
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in ("What is 17 plus 25?", "Hello", "Write a word.")
    ]
    (tmp_path / "serve.py").write_text(PLAIN_VLLM)
    done = subprocess.run(
        [sys.executable, "serve.py", tiny_run / "model", json.dumps(prompts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "model", dtype=torch.float32)
    for prompt, served in zip(prompts, json.loads(line.removeprefix("RESULT")), strict=True):
        tokens = torch.tensor([token for token, _ in served])
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
        assert len(tokens) == 24
        assert torch.equal(logits.argmax(-1), tokens)
        ours = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert (ours - torch.tensor([logprob for _, logprob in served])).abs().max() < 1e-3


def test_eval_of_the_saved_model_repeats_the_last_evaluation(
    tiny_run: Path, start: Callable[..., object], tmp_path: Path
) -> None:
    """Also shows that vLLM serves the saved folder: plain weights from disk, no trainer."""
    out_dir = tmp_path / "eval"
    command = start(
        "eval",
        "experiment=tiny",
        f"model.path={tiny_run / 'model'}",
        f"hydra.run.dir={out_dir}",
        cwd=tmp_path,
    )
    code, out, err = command.finish()  # type: ignore[attr-defined]
    assert code == 0, err
    assert "reward" in out
    again = msgspec.json.decode((out_dir / "evaluations" / "eval.json").read_bytes(), type=EvaluationResult)
    after = msgspec.json.decode((tiny_run / "evaluations" / "after.json").read_bytes(), type=EvaluationResult)
    assert [t.token_ids for t in again.examples] == [t.token_ids for t in after.examples]
