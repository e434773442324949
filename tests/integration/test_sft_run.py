"""A whole run of `k2rl sft` on the real Ray and the real trainer, stopped, resumed, and loaded elsewhere."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from k2rl.tracking.metrics import read_metrics
from k2rl.training.checkpoint import checkpoints
from tests.integration.conftest import Command, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 20
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}


def row(number: int) -> dict[str, object]:
    """A chat with a tool; what the tool says cannot be known before, and is not to be learned."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"x": number % 10}}}
    return {
        "messages": [
            {"role": "user", "content": f"Add {number % 10}."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": str(7919 * number % 10007), "tool_call_id": "c"},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [TOOL],
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_it_learns_stops_goes_on_and_loads(
    workers: int, start: Callable[..., Command], tmp_path: Path
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(f"{json.dumps(row(number))}\n" for number in range(100)))
    overrides = [f"data.path={data}", f"train.steps={STEPS}", "sft.lr=5e-3", f"cluster.workers={workers}"]
    command = start("sft", "experiment=tiny", *overrides, cwd=tmp_path)
    wait_for(
        lambda: any(step >= 5 for run in tmp_path.glob("outputs/*/*") for step, _ in checkpoints(run)),
        "a step",
    )
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.finish()
    assert code == 130, f"{out}\n{err}"
    assert "go on with: k2rl sft resume=" in err
    (run,) = tmp_path.glob("outputs/sft/*")
    code, out, err = start("sft", f"resume={run}", cwd=tmp_path).finish()
    assert code == 0, f"{out}\n{err}"
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["nll_after"] < 0.2 * summary["nll_before"]
    assert rows[-1]["sft/lr"] < 0.2 * max(row.get("sft/lr", 0.0) for row in rows)
    assert "held-out negative log-likelihood" in (run / "report.html").read_text()
    assert (
        _answer(run / "model", "Add 4.")
        == '<tool_call>\n{"name": "add", "arguments": {"x": 4}}\n</tool_call>'
    )


def _answer(folder: Path, question: str) -> str:
    """What plain transformers samples greedily."""
    from transformers import AutoModelForCausalLM

    from k2rl.models.chat import ChatTemplate
    from k2rl.types import Message, ToolSpec

    chat = ChatTemplate.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = chat.prompt_ids([Message("user", question)], [ToolSpec("add", "Adds.", {"type": "object"})])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[
        0, len(prompt) :
    ].tolist()
    return chat.decode(ids[: ids.index(chat.stop_token_ids[0])] if chat.stop_token_ids[0] in ids else ids)
