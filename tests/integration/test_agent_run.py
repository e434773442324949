"""An agent that only knows OpenAI's API, trained by a whole run through real Ray and real vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2rl.rollouts.recording import read_recording
from k2rl.tracking.metrics import read_metrics

pytestmark = pytest.mark.integration

AGENT = '''
from itertools import count

import openai

from k2rl.types import Task


def tasks(split, seed):
    for number in count():
        yield Task(f"{split}-{seed}-{number}", "agent", "default", split, number, {"word": f"w{number}"})


async def play(task, base_url, api_key):
    """Asks twice, once as a stream, and then once more from the beginning."""
    question = {"role": "user", "content": f"Say {task.data['word']}."}
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as model:
        first = await model.chat.completions.create(model="any", messages=[question], max_tokens=8)
        said = first.choices[0].message.content or ""
        follow = [question, {"role": "assistant", "content": said}, {"role": "user", "content": "Again."}]
        stream = await model.chat.completions.create(model="any", messages=follow, max_tokens=8, stream=True)
        async for chunk in stream:
            said += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        await model.chat.completions.create(model="any", messages=[question], max_tokens=8)
    return min(1.0, said.count("e") / 4)
'''


def test_an_agent_is_trained_on_what_it_was_told(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text(AGENT)
    agent = ("env=agent", "env.kwargs.agent=my_agent:play", "env.kwargs.tasks=my_agent:tasks")
    sizes = ("env.eval_tasks=4", "train.steps=2", "hydra.run.dir=run", "budget.default=64")
    command = start("train", "experiment=tiny", *agent, *sizes, cwd=tmp_path)
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["failed_episodes"] == 0
    for row in read_metrics(run):
        # Other tokens than those that were sampled, or other weights, would have other log-probs.
        assert row["mismatch/mean_abs_gap"] < 1e-4
        assert abs(row["mismatch/ratio_max"] - 1) < 1e-2
    for step in (1, 2):
        trajectories = read_recording(run, step).trajectories
        assert len(trajectories) == 8
        for trajectory in trajectories:
            (branch,) = trajectory.branches
            assert [message.role for message in branch.messages] == ["user", "assistant", "user", "assistant"]
            assert {
                version
                for line in (trajectory, branch)
                for version, sampled in zip(line.weight_versions, line.sampled_mask, strict=True)
                if sampled
            } == {step - 1}
