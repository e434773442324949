"""`k2rl eval suite=…`: baselines, a model over HTTP, kill -9, budgets, comparison, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envs.calculator import CalculatorEnv
from envs.coding.problems import own_problems
from envs.coding.replies import fenced
from k2rl.cli import main
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation import suite_command, suite_results
from k2rl.evaluation.suite_compare import compare, sign_test
from k2rl.evaluation.suite_options import parse
from k2rl.types import Split, Task
from tests.evaluation.chat_server import chat_server

SOLUTIONS = {problem.starter: str(problem.solution) for problem in own_problems("functions")}


def right(request: dict[str, Any]) -> str:
    """The solution of the function that is asked for."""
    question = request["messages"][-1]["content"]
    return next(fenced(solution) for starter, solution in SOLUTIONS.items() if starter.strip() in question)


def half_right(request: dict[str, Any]) -> str:
    """Right for every second function, by its place; hostile text for the others."""
    question = request["messages"][-1]["content"]
    place = next(i for i, starter in enumerate(SOLUTIONS) if starter.strip() in question)
    return right(request) if place % 2 else "<script>alert(1)</script> \x1b[31m \ud800"


class Sums(CalculatorEnv):
    """An environment of somebody else's."""

    def __init__(self, faults: str = "") -> None:
        super().__init__()
        self.faults = faults

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        if self.faults == "raises":
            raise OSError("no connection")
        if self.faults == "hangs":
            threading.Event().wait()
        some = [*islice(super().tasks(split, seed), 4)]
        return iter({"empty": [], "twice": [some[0]] * 2, "nonsense": [1]}.get(self.faults, some))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("suite", "tasks"),
    [
        *(("functions", 12), ("contests", 6), ("bugs", 6), ("swe", 3), ("harbor", 3)),
        *(("calculator", 8), ("python_math", 7), ("customer_service", 11), ("twenty_four", 4), ("sudoku", 4)),
        *(("reasoning_gym", 8), ("code_function", 2), (f"{__name__}:Sums", 4)),
    ],
)
def test_gold_solves_a_suite_and_null_nothing(suite: str, tasks: int, capsys) -> None:
    if suite == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    limit = [] if suite in ("functions", "contests", "bugs", "swe", "harbor") else [f"limit={tasks}"]
    for model, solved in (("gold", tasks), ("null", 0)):
        assert main(["eval", f"suite={suite}", f"model={model}", *limit]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{suite} {model}: {solved}/{tasks}"


@pytest.mark.parametrize("cheat", ["pass", "half", "early_exit", "early_exit_in_call", "always_equal"])
def test_cheats_solve_nothing(cheat: str) -> None:
    for suite in ("functions", "swe"):
        said = suite_command.run([f"suite={suite}", f"model=cheat:{cheat}"])
        assert said.splitlines()[-1].split(": ")[-1].startswith("0/"), said


@pytest.mark.slow
@pytest.mark.parametrize("sandbox", ["bubblewrap", "docker"])
@pytest.mark.parametrize(
    ("model", "solved"),
    [("gold", 164), ("null", 0)]
    + [(f"cheat:{name}", 0) for name in ("pass", "half", "early_exit", "always_equal")],
)
def test_humaneval(model: str, solved: int, sandbox: str) -> None:
    if sandbox == "docker":
        pytest.importorskip("sandboxes.docker")
        if subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=60).returncode:
            pytest.skip("no docker daemon answers")
    said = suite_command.run(["suite=humaneval", f"model={model}", f"sandbox={sandbox}"])
    assert said.splitlines()[-1] == f"humaneval {model}: {solved}/164"


def test_a_model_over_http(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with chat_server(half_right) as server:
        words = [
            "suite=functions",
            f"model={server.url}",
            "samples=2",
            "k=1,2",
            "temperature=0.8",
            "out=first",
        ]
        said = suite_command.run(words)
        assert said.splitlines()[-1].endswith(": 6/12")
        assert len(server.requests) == 24
        assert set(server.keys) == {"Bearer secret"}
        assert {request["model"] for request in server.requests} == {"small"}
        assert len({request["seed"] for request in server.requests}) == 24
        again = suite_command.run([*words, "output=json"])
        assert len(server.requests) == 24, "all of it was in the cache"
    results = json.loads(again)
    assert (results["reused"], results["played"], results["completion_tokens"]) == (24, 24, 240)
    assert results["overall"]["pass_at"]["2"]["mean"] == 0.5
    assert results["per_tag"]["easy"]["tasks"] > 1
    loaded, records = suite_results.load(folder / "first")
    assert loaded.fraction == "6/12"
    assert len(records) == 24
    page = (folder / "first" / "report.html").read_text()
    assert "<script>" not in page
    assert "secret" not in page
    HTMLParser().feed(page)


def test_an_evaluation_goes_on_after_kill_9(folder: Path) -> None:
    answered, killed = 0, threading.Event()

    def five_then_none(request: dict[str, Any]) -> str:
        nonlocal answered
        if answered >= 5 and not killed.is_set():
            killed.wait(120)
        answered += 1
        return right(request)

    with chat_server(five_then_none) as server:
        words = ["suite=functions", f"model={server.url}", "parallel=1", "out=out"]
        command = [sys.executable, "-m", "k2rl.cli", "eval", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # The sixth request means that the fifth episode is finished and kept.
            deadline = threading.Event()
            for _ in range(600):
                if len(server.requests) > 5 or process.poll() is not None:
                    break
                deadline.wait(0.1)
            assert len(server.requests) == 6
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.set()
        said = suite_command.run(words)
        assert said.splitlines()[-1].endswith(": 12/12")
        assert "5 reused" in said
        assert len(server.requests) == 6 + 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_an_evaluation_from_outside_is_said_and_leaves_results(
    folder: Path, number: signal.Signals
) -> None:
    asked, answer = threading.Event(), threading.Event()

    def two_then_none(request: dict[str, Any]) -> str:
        if len(server.requests) > 2:
            asked.set()
            answer.wait(120)
        return right(request)

    with chat_server(two_then_none) as server:
        words = ["suite=functions", f"model={server.url}", "parallel=1", "out=out"]
        command = [sys.executable, "-m", "k2rl.cli", "eval", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert asked.wait(60)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            answer.set()
    assert process.returncode == 130
    (line,) = [line for line in err.splitlines() if not line.startswith("…")]
    assert line == "k2rl: interrupted; out has what was finished; the same command goes on from there"
    assert out == ""
    loaded, records = suite_results.load(folder / "out")
    assert (loaded.played, loaded.planned, len(records)) == (2, 12, 2)


def test_results_that_cannot_be_written_are_one_line(folder: Path, capsys) -> None:
    (folder / "out" / "results.json.tmp").mkdir(parents=True)
    assert main(["eval", "suite=calculator", "model=gold", "limit=1", "out=out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "k2rl: the results cannot be written to out: Is a directory"


def test_an_environments_arguments_decide_what_is_kept() -> None:
    def wrong(request: dict[str, Any]) -> str:
        return "Answer: 1"

    with chat_server(wrong) as server:
        words = ["suite=twenty_four", f"model={server.url}", "limit=1"]
        for more, asked in ((), 3), (("env.tries=1",), 4), ((), 4), (("env.tries=2",), 6):
            suite_command.run([*words, *more])
            assert len(server.requests) == asked


def test_budgets_stop_what_has_not_begun() -> None:
    with chat_server(right) as server:
        words = ["suite=functions", f"model={server.url}", "parallel=1", "output=json"]
        results = json.loads(suite_command.run([*words, "token_budget=25"]))
        assert (results["played"], results["planned"], results["stopped_by"]) == (3, 12, "token_budget=25")
        # What is finished costs nothing: the next run gets three further.
        results = json.loads(suite_command.run([*words, "token_budget=25"]))
        assert (results["played"], results["reused"]) == (6, 3)


def test_a_lost_model_ends_the_evaluation_and_keeps_what_is_finished(folder: Path) -> None:
    def refusing(request: dict[str, Any]) -> str | tuple[int, str]:
        return right(request) if len(server.requests) <= 4 else (401, "the key is no good any more")

    with chat_server(refusing) as server:
        words = ["suite=functions", f"model={server.url}", "parallel=1", "out=out"]
        with pytest.raises(RunError, match="HTTP 401: the key is no good any more"):
            suite_command.run(words)
    loaded, records = suite_results.load(folder / "out")
    assert (loaded.played, len(records)) == (4, 4)


def test_a_judge_that_fails_gives_no_score(folder: Path) -> None:
    broken = own_problems("contests")[2]
    broken = msgspec.structs.replace(
        broken, tests=msgspec.structs.replace(broken.tests, checker="def check(*a): return 1")
    )
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(msgspec.json.encode(p) for p in (*own_problems("contests")[:2], broken)))
    said = suite_command.run(["suite=code", f"path={path}", "model=gold"])
    assert said.splitlines()[-1] == "code gold: 2/3"
    assert "failed, 1 times: JudgeError: the problem's checker gave no True or False" in said


def test_two_evaluations_are_compared(folder: Path, capsys) -> None:
    with chat_server(half_right) as server:
        suite_command.run(["suite=functions", f"model={server.url}", "out=half"])
    suite_command.run(["suite=functions", "model=gold", "out=gold"])
    comparison = compare(folder / "half", folder / "gold")
    assert comparison.difference.mean == 0.5
    assert (len(comparison.better), comparison.worse, comparison.same) == (6, (), 6)
    assert main(["eval", "compare", "half", "gold"]) == 0
    assert "difference +0.500" in capsys.readouterr().out
    suite_command.run(["suite=contests", "model=null", "out=other"])
    for words in (["half"], ["half", "nowhere"], ["half", "other"]):
        with pytest.raises(ConfigError):
            suite_command.compare(words)


@pytest.mark.parametrize(
    ("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (3, 3, 1.0), (9, 1, 0.021484375)]
)
def test_sign_test(better: int, worse: int, p: float) -> None:
    assert sign_test(better, worse) == p
    assert sign_test(worse, better) == p


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["suite=humanevil", "model=gold"], "suite=humanevil is not one of: humaneval"),
        (["suite=functions"], "model= is missing"),
        (["suite=functions", "model=gold", "sample=2"], "did you mean samples=?"),
        (["suite=functions", "model=gold", "samples=two"], "samples is a number"),
        (["suite=functions", "model=gold", "samples=0"], "samples=0 must be at least 1"),
        (["suite=functions", "model=gold", "k=2"], "pass@2 needs samples=2"),
        (["suite=functions", "model=gold", "k=x"], "k=x must be whole numbers"),
        (["suite=functions", "model=gold", "minutes=nan"], "minutes=nan must be a finite number"),
        (["suite=functions", "model=gold", "path=x"], "path=x does nothing with suite=functions"),
        (["suite=livecodebench", "model=gold"], "needs path=FILE"),
        (["suite=mbpp", "model=gold", "path=nowhere.jsonl"], "there is no such file"),
        (["suite=contests", "model=gold", "since=2030-01-01"], "no problem was released between"),
        (["suite=functions", "model=cheat:hope"], "there are: pass, half"),
        (["suite=functions", "model=http://127.0.0.1:9/v1"], "no list of models there"),
        (["suite=functions", "model=no-such-model"], "no-such-model"),
        (["suite=functions", "model=x", "samples=2"], "set a temperature"),
        (["suite=functions", "model=gold", "sandbox=chroot"], "no sandbox backend 'chroot'"),
        (["suite=twenty_four", "model=gold", "env.tries=0"], "tries=0 must be a whole number of at least 1"),
        (["suite=twenty_four", "model=gold", "env.try=1"], "got an unexpected keyword argument 'try'"),
        (["suite=agent", "model=gold"], "suite=agent is played by its agent"),
        (["suite=nowhere:Env", "model=gold"], "cannot import nowhere"),
        ([f"suite={__name__}:Sums", "model=gold", "env.faults=raises"], "OSError: no connection"),
        (
            [f"suite={__name__}:Sums", "model=gold", "env.faults=hangs", "episode_s=0.1"],
            "gives no tasks: not done within 0.1 s",
        ),
        ([f"suite={__name__}:Sums", "model=gold", "env.faults=empty"], "gives no held-out tasks"),
        ([f"suite={__name__}:Sums", "model=gold", "env.faults=nonsense"], "gives what are no tasks"),
        ([f"suite={__name__}:Sums", "model=gold", "env.faults=twice"], "gives 2 tasks the same id"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys) -> None:
    assert main(["eval", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_options_keep_their_types() -> None:
    options = parse(["suite=a", "model=b", "samples=3", "k=3,1", "temperature=0.5"])
    assert (options.samples, options.ks, options.temperature) == (3, (1, 3), 0.5)
