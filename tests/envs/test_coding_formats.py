"""Rows as others publish them become problems that their own solutions solve."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from pathlib import Path

import pytest

from envs.coding.formats import read_problems
from envs.coding.patches import PatchError, apply_patch
from envs.coding.problems import OWN, load_problems, own_problems, released_between
from envs.coding.replies import code_of, completed
from k2rl.errors import ConfigError
from rubrics.code import AssertTests, FunctionTests, ProgramTests

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "import math\n\ndef area(r):\n    '''Of a circle.'''\n",
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
}
EVALPLUS = {
    **{key: HUMANEVAL[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")},
    "base_input": [[1], [2.5]],
    "plus_input": [[0], [-1]],
    "atol": 1e-6,
}
MBPP = {
    "task_id": 601,
    "text": "Write a function to find the longest chain of pairs.",
    "code": "class Pair(object):\n    def __init__(self, a, b):\n        self.a = a\n"
    "        self.b = b\n"
    "def longest(arr, n):\n    arr = sorted(arr, key=lambda p: p.b)\n    count, last = 0, -1\n"
    "    for pair in arr:\n        if pair.a > last:\n            count, last = count + 1, pair.b\n"
    "    return count",
    "test_list": ["assert longest([Pair(5, 24), Pair(15, 25), Pair(27, 40), Pair(50, 60)], 4) == 3"],
    "test_setup_code": "",
    "challenge_test_list": ["assert longest([Pair(1, 2)], 1) == 1"],
}
STDIN = {
    "question_title": "A",
    "question_content": "Add two numbers.",
    "platform": "atcoder",
    "question_id": "abc_a",
    "contest_date": "2024-08-10T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": base64.b64encode(
        zlib.compress(pickle.dumps(json.dumps([{"input": "5 5", "output": "10", "testtype": "stdin"}])))
    ).decode(),
    "metadata": "{}",
}
FUNCTIONAL = {
    **STDIN,
    "question_id": "3600",
    "contest_date": "2025-01-04T00:00:00",
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "1\n[2]", "output": "3", "testtype": "functional"}]),
    "private_test_cases": "[]",
    "metadata": '{"func_name": "add"}',
}


def written(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("row", [HUMANEVAL, EVALPLUS, MBPP], ids=["humaneval", "evalplus", "mbpp"])
def test_a_row_is_solved_by_its_own_solution_alone(row: dict, tmp_path: Path, judge) -> None:
    (problem,) = read_problems(written(tmp_path / "rows.jsonl", row))
    assert isinstance(problem.tests, AssertTests)
    assert judge(problem.tests, str(problem.solution)).solved
    assert not judge(problem.tests, str(problem.solution).replace("return", "return 1 +")).solved


def test_livecodebench(tmp_path: Path, judge) -> None:
    stdin, functional = read_problems(written(tmp_path / "rows.jsonl", STDIN, FUNCTIONAL))
    assert isinstance(stdin.tests, ProgramTests)
    assert [case.expected for case in stdin.tests.cases] == ["3\n", "10"]
    assert stdin.tags == ("atcoder", "easy")
    assert judge(stdin.tests, "print(sum(map(int, input().split())))").solved
    assert isinstance(functional.tests, FunctionTests)
    code = functional.starter + "return a + b[0]\n"
    assert judge(functional.tests, code).solved
    assert not judge(functional.tests, code.replace("+", "-")).solved
    problems = [stdin, functional]
    assert released_between(problems, None, "2025-01-01") == [stdin]
    assert released_between(problems, "2025-01-01", None) == [functional]
    assert released_between(problems, "2024-08-10", "2025-01-04") == [stdin]
    with pytest.raises(ConfigError, match="theirs are 2024-08-10 to 2025-01-04"):
        released_between(problems, "2026-01-01", None)
    with pytest.raises(ConfigError, match="not a date"):
        released_between(problems, "soon", None)


def test_a_pickle_that_wants_more_than_text_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (eval, ("1 / 0",))

    bomb = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(ConfigError, match="builtins.eval"):
        read_problems(written(tmp_path / "rows.jsonl", {**STDIN, "private_test_cases": bomb}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no rows"),
        (b"{]", "line 1: not JSON"),
        (b'{"a": 1}', "of no known format"),
        (b'{"task_id": 1, "code": "def f(): pass", "test_list": ["assert 1"]}', "row 1"),
        (b"\xff\xfe", "cannot be read"),
        (gzip.compress(b"{}", mtime=0)[:8], "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / ("rows.jsonl.gz" if content[:2] == b"\x1f\x8b" else "rows.jsonl")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        read_problems(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OWN)
def test_our_own_problems_have_solutions_and_distinct_names(name: str) -> None:
    problems = own_problems(name)
    assert len({problem.id for problem in problems}) == len(problems)
    assert all(problem.solution for problem in problems)
    assert {problem.split for problem in problems} == {"train", "eval"}
    assert load_problems(name, "auto") == problems


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\nx = 1\n```\nor\n```py\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```bash\nls\n```", ""),
        ("", ""),
    ],
)
def test_the_code_of_a_reply(reply: str, code: str) -> None:
    assert code_of(reply) == code


def test_a_reply_goes_on_from_the_starter_or_says_it_all() -> None:
    starter = "import math\ndef help(): return 2\n\ndef f(x):\n    '''Doc.'''\n"
    assert completed(starter, "    return x\n", "f") == starter + "    return x\n"
    whole = completed(starter, "```python\ndef f(x):\n    return help()\n```", "f")
    assert whole == "import math\ndef help(): return 2\n\ndef f(x):\n    return help()\n"


def test_patches_do_what_git_does(tmp_path: Path) -> None:
    import subprocess

    before = {
        "a.py": b"one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\n",
        "gone.txt": b"x\ny\n",
        "end.txt": b"no newline",
        "moved.txt": b"1\n2\n3\n4\n5\n",
    }
    after = {
        "a.py": b"zero\none\ntwo\nTHREE\nfour\nfive\nsix\nseven\neight\nten\neleven\n",
        "end.txt": b"no newline\nand one\n",
        "new/file.txt": b"hello\n",
        "there.txt": b"1\n2\n3\n4\nfive\n",
    }

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    for path, content in before.items():
        (tmp_path / path).write_bytes(content)
    git("add", "-A")
    git("commit", "-qm", "before")
    for path in before:
        (tmp_path / path).unlink()
    (tmp_path / "new").mkdir()
    for path, content in after.items():
        (tmp_path / path).write_bytes(content)
    git("add", "-A")
    for options in ((), ("-M",), ("--no-renames",), ("-U0",)):
        changes = apply_patch(before, git("diff", "--cached", *options))
        result = {path: content for path, content in {**before, **changes}.items() if content is not None}
        assert result == after, options


@pytest.mark.parametrize(
    "patch",
    [
        "",
        "hello",
        "@@ -1 +1 @@\n-a\n+b\n",
        "--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n-two\n+b\n",
        "--- a/a.py\n+++ b/a.py\n@@ -9,1 +9,1 @@\n-one\n+b\n",
        "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1 @@\n-one\n+b",
        "--- a/b.py\n+++ b/b.py\n@@ -1 +1 @@\n-one\n+b\n",
        "diff --git a/x b/x\nGIT binary patch\nliteral 0\n",
    ],
)
def test_a_patch_that_does_not_fit_is_refused(patch: str) -> None:
    with pytest.raises(PatchError):
        apply_patch({"a.py": b"one\n"}, patch)
