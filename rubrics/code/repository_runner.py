"""Runs inside a fresh sandbox: a repository's tests, under pytest, with what happened to each test by its id.

Tests and code under test share this process, so the code could do anything to what it finds here. What can be
done about it: pytest comes from outside and its plugins, `sitecustomize` and the cache are left out; the
outcome leaves by a descriptor that is nobody's stdout, once, with a token; a process that ends early has no
outcome; control tests that must fail run last, and a harness in which they pass was tampered with; and what
`==` says is checked with a value that is surely another one.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import unittest
from typing import Any

PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None))


class _Other:
    """An object that nothing else equals."""


def check_equal(first: Any, second: Any) -> None:
    """Fail if one of the two is equal to things that it cannot be equal to.

    Raises:
        AssertionError: it is.
    """
    plain = [type(value) in PLAIN for value in (first, second)]
    if all(plain):
        return
    for value, other, other_is_plain in ((first, second, plain[1]), (second, first, plain[0])):
        if type(value) in PLAIN:
            continue
        unequal = _another(other) if other_is_plain else _Other()
        if _says_equal(value, unequal):
            raise AssertionError(f"a {type(value).__name__} that equals anything")


def _another(value: Any) -> Any:
    """A value of the same type that is another one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float | complex):
        return value + 1234567 if value == value and value not in (float("inf"), float("-inf")) else 0.5
    if isinstance(value, str):
        return value + "\x00another"
    if isinstance(value, bytes):
        return value + b"\x00another"
    if isinstance(value, list | tuple):
        return type(value)([*value, "\x00another"])
    if isinstance(value, dict):
        return {**value, "\x00another": 1}
    if isinstance(value, set | frozenset):
        return value | {"\x00another"}
    return "\x00another"


def _says_equal(value: Any, other: Any) -> bool:
    try:
        return bool(value == other)
    # Arrays have no truth, and what may not be compared raises: neither claims to be equal.
    except Exception:  # noqa: BLE001
        return False


def _equal(first: Any, second: Any) -> Any:
    """What stands for `first == second` in instrumented tests."""
    result = first == second
    check_equal(first, second)
    return result


class Recorder:
    """A pytest plugin that notes each test's outcome: `passed`, or what became of it instead."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.details: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        good = report.outcome == "passed" and not hasattr(report, "wasxfail")
        before = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = before if good else str(report.outcome)
        if not good:
            self.outcomes[report.nodeid] = "failed" if report.outcome == "failed" else "not passed"
            self.details.setdefault(report.nodeid, str(report.longreprtext)[-500:])

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self.details[report.nodeid] = str(report.longreprtext)[-500:]


def main(request: dict[str, Any]) -> None:
    """Run the tests; `{"token", "outcomes", "details"}` is all that comes on standard output."""
    answers = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    token, home = request["token"], os.getcwd()  # noqa: PTH109
    # Behind the standard library and pytest: no file of the repository is taken for theirs.
    sys.path.append(request["libraries"])
    import pytest

    sys.path += [os.path.normpath(os.path.join(home, root)) for root in request["roots"]]  # noqa: PTH118
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True
    setattr(builtins, request["equal"], _equal)
    _instrument_unittest()
    recorder = Recorder()
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", home, "-o", "addopts="]
    write, end, dumps = os.write, os._exit, json.dumps
    pytest.main([*options, *request["paths"]], plugins=[recorder])
    answer = dumps({"token": token, "outcomes": recorder.outcomes, "details": recorder.details}).encode()
    while answer:
        answer = answer[write(answers, answer) :]
    end(0)


def _instrument_unittest() -> None:
    plainly = unittest.TestCase.assertEqual

    def assert_equal(self: unittest.TestCase, first: Any, second: Any, msg: Any = None) -> None:
        plainly(self, first, second, msg)
        check_equal(first, second)

    unittest.TestCase.assertEqual = assert_equal  # type: ignore[method-assign]
