import asyncio
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

import envs
from k2rl.authoring.check import Settings, check
from k2rl.types import Message, Trajectory, Verdict
from rubrics import judge_safely

DOCUMENT = Path(__file__).parents[2] / "docs" / "write-an-environment.md"


NAMES = ("guess", "capital", "fewer_turns")


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The document's Python blocks, as modules one can import."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    for name, block in zip(NAMES, blocks, strict=True):
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


def test_the_documented_environment_works(documented, play, check_gymnasium):
    env = envs.make("guess:GuessEnv")
    check_gymnasium(env)
    secrets = {}
    for split in ("train", "eval"):
        tasks = list(islice(env.tasks(split, 0), 100))
        secrets[split] = {task.data["secret"] for task in tasks}
        for task in tasks:
            assert play(env, task, env.demonstration(task)).reward == 1.0
            lost = play(env, task, ["no idea", *["51"] * 5, "never asked for"])
            assert lost.done
            assert lost.reward == 0.0
            assert lost.components == {"won": 0.0, "unreadable": 1.0}
    assert secrets["train"].isdisjoint(secrets["eval"])


@pytest.mark.parametrize("id", ["guess:GuessEnv", "capital:CapitalEnv"])
def test_the_documented_environments_pass_their_check(id, documented):
    only = ("splits", "gymnasium", "demonstrations", "nonsense", "equal seeds")
    findings = asyncio.run(check(id, {}, Settings(), only))
    assert {finding.status for finding in findings} == {"ok"}, findings


def test_the_documented_rubric_works(documented):
    env = envs.make("guess:GuessEnv")
    rubric = envs.rubric_of(env, "fewer_turns:FewerTurns")
    trajectory = Trajectory(
        id="t",
        group_id="g",
        task=next(env.tasks("train", 0)),
        temperature=1.0,
        messages=[Message(role="assistant", content="25"), Message(role="assistant", content="26")],
        env_reward=1.0,
    )
    assert asyncio.run(judge_safely(rubric, trajectory, 1.0)) == Verdict.scored(0.9, {"turns": 2.0})
