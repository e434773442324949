"""The coding environments, played on real sandboxes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import envs
from envs.coding.judging import close_judges
from envs.coding.repositories import load_tasks
from envs.coding.swe_build import build_here
from envs.tools.formats import written
from k2rl.errors import ConfigError
from k2rl.types import Message, Task
from tests.envs.conftest import Episode, play_async, running, spelled

IDS = ("code_function", "code_contest", "code_debug", "swe", "harbor")


@pytest.mark.parametrize("id", IDS)
def test_gymnasium_accepts_what_they_answer(id: str, check_gymnasium: Callable[..., None]) -> None:
    with asyncio.Runner() as runner:
        env = envs.make(id)
        try:
            check_gymnasium(env, lambda answer: runner.run(envs.maybe_await(answer)))
        finally:
            runner.run(envs.maybe_await(env.close()))
            runner.run(close_judges())


async def played(env: envs.TextEnv, task: Task, turns: Sequence[str | Message]) -> Episode:
    try:
        return await play_async(env, task, turns)
    finally:
        await envs.maybe_await(env.close())


@pytest.mark.parametrize("id", IDS)
def test_demonstrations_earn_1_and_empty_answers_0(id: str) -> None:
    env = envs.make(id)

    async def work() -> None:
        for split in ("train", "eval"):
            task = next(env.tasks(split, 0))
            turns = env.demonstration(task)
            assert turns is not None
            right = await played(env, task, turns)
            assert (right.done, right.reward) == (True, 1.0)
            wrong = await played(env, task, [""])
            assert (wrong.done, wrong.reward) == (True, 0.0)

    running(work)


@pytest.mark.parametrize("id", IDS)
def test_tasks_are_the_same_for_a_seed_and_the_splits_share_none(id: str) -> None:
    drawn = {}
    for split in ("train", "eval"):
        tasks = list(islice(envs.make(id).tasks(split, 3), 20))
        assert tasks == list(islice(envs.make(id).tasks(split, 3), 20))
        assert len({task.id for task in tasks}) == 20
        assert all(task == json_back(task) for task in tasks)
        drawn[split] = {json.dumps(task.data) for task in tasks}
    assert drawn["train"].isdisjoint(drawn["eval"])


def json_back(task: Task) -> Task:
    import msgspec

    return msgspec.json.decode(msgspec.json.encode(task), type=Task)


def test_a_policy_writes_runs_reads_the_error_and_tries_again() -> None:
    env = envs.make("code_debug")
    task = next(task for task in env.all_tasks() if task.id == "bugs/flatten")

    async def work() -> Episode:
        solution = env.demonstration(task)[-2]
        turns = [
            spelled("shell", command="cd /tmp && pwd"),
            spelled("shell", command="cd - >/dev/null; python3 test_solution.py; echo status $?"),
            spelled("read_file", path="solution.py"),
            spelled("read_file", path="nowhere.py"),
            spelled("write_file", path="test_solution.py", content="print('passed')"),
            spelled("shell", command="exit 3"),
            spelled("shell", command="echo still here"),
            "<tool_call>{</tool_call>" + spelled("shell", command="echo second"),
            solution,
            spelled("shell", command="(sleep 1000; echo 'x = 1' > solution.py) & yes | head -c 100000"),
            spelled("submit"),
        ]
        return await played(env, task, turns)

    episode = running(work)
    answers = [message.content for message in episode.messages if message.role == "tool"]
    assert answers[0] == "/tmp"
    assert "AssertionError" in answers[1]
    assert "status 1" in answers[1]
    assert "def flatten" in answers[2]
    assert answers[3].startswith("error: nowhere.py: missing")
    assert answers[6] == "still here"
    assert answers[7].startswith("error: the call is no JSON")
    assert answers[8] == "second"
    assert "characters left out" in answers[10]
    assert episode.reward == 1.0
    assert (episode.components["calls"], episode.components["bad_calls"]) == (11.0, 2.0)


def test_what_a_policy_does_to_its_workspace_does_not_reach_the_hidden_tests() -> None:
    env = envs.make("swe")
    task = env.all_tasks()[0]

    async def work() -> list[Episode]:
        edits = [
            [
                spelled(
                    "shell",
                    command="rm -rf tests; mkdir tests; echo 'def test_x(): pass' > tests/test_ledger.py",
                )
            ],
            [spelled("write_file", path="conftest.py", content="import os\nos._exit(0)\n")],
            [spelled("shell", command="ln -s /etc/passwd purse/link; mkfifo purse/pipe; rm -rf purse")],
            [spelled("shell", command="head -c 20000000 /dev/zero > big")],
        ]
        return [await played(env, task, [*turns, spelled("submit")]) for turns in edits]

    episodes = running(work)
    assert [episode.reward for episode in episodes] == [0.0] * 4


def test_tasks_are_built_from_a_git_history(tmp_path: Path) -> None:
    repository, out = tmp_path / "shop", tmp_path / "out"

    def commit(message: str, files: dict[str, str]) -> None:
        for path, text in files.items():
            (repository / path).parent.mkdir(parents=True, exist_ok=True)
            (repository / path).write_text(text)
        for arguments in (["add", "-A"], ["commit", "-qm", message]):
            git(*arguments)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *identity, *arguments], cwd=repository, check=True)

    repository.mkdir()
    git("init", "-q")
    test = "from shop import price\n\ndef test_price():\n    assert price(2) == 20\n"
    commit("A shop", {"shop.py": "def price(n):\n    return n * 10\n", "test_shop.py": test})
    commit("Words", {"README.md": "A shop.\n"})
    commit(
        "Ten are cheaper\n\nFrom ten on, a tenth off.",
        {
            "shop.py": "def price(n):\n    return n * 10 if n < 10 else n * 9\n",
            "test_shop.py": f"{test}\ndef test_many():\n    assert price(10) == 90\n",
        },
    )
    commit(
        "A test that says nothing new",
        {
            "shop.py": "def price(n):\n    return n * (10 if n < 10 else 9)\n",
            "test_shop.py": f"{test}\ndef test_any():\n    assert price(1) == 10\n",
        },
    )
    said: list[str] = []

    async def build() -> int:
        return await build_here(repository, out, sandbox="bubblewrap", limit=9, seconds=10.0, say=said.append)

    assert asyncio.run(build()) == 1
    assert [line.split(": ")[-1] for line in said] == [
        "no task, no test fails before it and passes after it",
        "1 tests to pass, 1 to go on passing",
    ]
    (task,) = load_tasks(str(out / "tasks.jsonl"))
    assert task.issue == "Ten are cheaper\n\nFrom ten on, a tenth off."
    assert task.tests.fail_to_pass == ("test_shop.py::test_many",)
    assert task.tests.pass_to_pass == ("test_shop.py::test_price",)
    assert task.tests.checks_equality
    assert set(task.solution) == {"shop.py"}
    env = envs.make("swe", tasks_file=str(out / "tasks.jsonl"))
    (built,) = env.all_tasks()
    assert running(lambda: played(env, built, env.demonstration(built))).reward == 1.0

    with pytest.raises(ConfigError, match="git log in"):
        asyncio.run(build_here(tmp_path, out, sandbox="bubblewrap", limit=1, seconds=1.0, say=said.append))


def test_swebench_rows_with_a_clone_or_a_snapshot(tmp_path: Path) -> None:
    purse = load_tasks(None)[0]
    row: dict[str, Any] = {
        "instance_id": "purse__purse-1",
        "repo": "purse/purse",
        "base_commit": "HEAD",
        "problem_statement": purse.issue,
        "FAIL_TO_PASS": json.dumps(purse.tests.fail_to_pass),
        "PASS_TO_PASS": json.dumps(purse.tests.pass_to_pass),
        "created_at": "2024-05-01T10:00:00Z",
    }
    clone = tmp_path / "repos" / "purse__purse"

    def write(files: dict[str, Any]) -> None:
        for path, text in files.items():
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            (clone / path).write_text(text)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=clone, check=True, capture_output=True, text=True
        )
        return done.stdout

    clone.mkdir(parents=True)
    git("init", "-q")
    write(purse.files)
    git("add", "-A")
    git("commit", "-qm", "base")
    for key, files in (("patch", purse.solution), ("test_patch", purse.tests.files)):
        write(files)
        row[key] = git("diff")
        git("checkout", "-q", ".")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    env = envs.make("swe", tasks_file=str(path))
    (task,) = env.all_tasks()
    assert running(lambda: played(env, task, env.demonstration(task))).reward == 1.0
    clone.rename(tmp_path / "elsewhere")
    path.write_text(json.dumps({**row, "instance_id": "other"}))
    with pytest.raises(ConfigError, match="row 1"):
        envs.make("swe", tasks_file=str(path))


def test_a_turn_with_submit_is_judged_after_the_calls_before_it() -> None:
    env = envs.make("code_debug")
    task = env.all_tasks()[0]

    async def work() -> Episode:
        *_, solution, submit = map(written, env.demonstration(task))
        return await played(env, task, [f"I am sure.\n{solution}{submit}"])

    assert running(work).reward == 1.0


def test_the_tools_of_a_workspace_are_told_as_tools() -> None:
    for id in ("code_debug", "swe", "harbor"):
        names = [spec.name for spec in envs.make(id).tools]
        assert names == ["shell", "read_file", "write_file", "submit"]
