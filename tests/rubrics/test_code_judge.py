"""The code judge: tests that are code, programs with checkers, and faults that are no zeros."""

from __future__ import annotations

import pytest

from rubrics.code import (
    AssertTests,
    CallCase,
    CodeJudge,
    FunctionTests,
    JudgeError,
    ProgramCase,
    ProgramTests,
)
from rubrics.code.text import difference
from sandboxes.base import Limits
from sandboxes.errors import SandboxUnavailableError

STACK = """
class Stack:
    def __init__(self, *items):
        self.items = list(items)
    def push(self, item):
        self.items.append(item)
    def pop(self):
        return self.items.pop()
    def __len__(self):
        return len(self.items)
    def __eq__(self, other):
        return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other):
        return Stack(*self.items, *other.items)
"""
STACK_TESTS = AssertTests(
    """
import unittest
from solution import Stack

class TestStack(unittest.TestCase):
    def setUp(self):
        self.stack = Stack(1)

    def test_push_and_pop(self):
        self.stack.push([2, (3,)])
        self.assertEqual(self.stack.pop(), [2, (3,)])
        self.assertEqual(len(self.stack), 1)

    def test_empty(self):
        self.stack.pop()
        with self.assertRaises(IndexError):
            self.stack.pop()

def test_objects():
    assert Stack(1) + Stack(2) == Stack(1, 2)
    assert not Stack(1) == Stack(2)
    assert isinstance(Stack(), Stack)
    assert (Stack(1) + Stack(2)).items == [1, 2]
    assert Stack(1) != 1
"""
)


@pytest.mark.parametrize("reference", [None, STACK])
def test_a_unit_test_file_sees_classes_and_objects(reference: str | None, judge) -> None:
    tests = AssertTests(STACK_TESTS.source, reference=reference)
    outcome = judge(tests, STACK)
    assert (outcome.passed, outcome.total) == (3, 3), outcome
    outcome = judge(tests, STACK.replace("self.items.pop()", "self.items.pop(0)"))
    assert (outcome.passed, outcome.total) == (2, 3)
    assert "test_push_and_pop" in outcome.detail
    assert judge(tests, STACK.replace("self.items == other.items", "True")).passed == 2


def test_a_checker_takes_any_right_answer(judge) -> None:
    tests = ProgramTests(
        [ProgramCase("12", "3 4"), ProgramCase("7", "1 7")],
        checker="def check(stdin, expected, output):\n"
        "    a, b = map(int, output.split())\n    return a * b == int(stdin)",
    )
    assert judge(tests, "n = int(input())\nprint(n, 1)").solved
    assert not judge(tests, "print(3, 4)").solved


@pytest.mark.parametrize(
    "tests",
    [
        AssertTests(
            "def check(candidate):\n    assert candidate(1) == 1", "f", reference="def f(x): return 2"
        ),
        AssertTests("def check(candidate):\n    assert candidate(1) ==", "f"),
        AssertTests("raise RuntimeError('no data')", "f"),
        AssertTests("x = 1"),
        ProgramTests([ProgramCase("1", "1")], checker="def check(stdin, expected, output): return 'yes'"),
        ProgramTests([ProgramCase("1", "1")], checker="def check(stdin, expected, output): return 1 / 0"),
    ],
    ids=["wrong reference", "no Python", "raises", "no tests", "checker says neither", "checker raises"],
)
def test_a_fault_of_the_problem_is_no_score(tests, judge) -> None:
    with pytest.raises(JudgeError):
        judge(tests, "def f(x): return 1\nprint(1)")


def test_a_fault_of_the_sandbox_is_a_failed_verdict(loop) -> None:
    class Gone:
        name = "gone"

        async def open(self, spec):
            raise SandboxUnavailableError("there is no bwrap here; install it")

        async def close(self):
            return None

    async def verdict():
        return await CodeJudge(Gone(), parallel=1, limits=Limits()).verdict(
            FunctionTests("f", [CallCase([1], 1)]), "def f(x): return x"
        )

    verdict = loop.run(verdict())
    assert not verdict.ok
    assert verdict.failure == "SandboxUnavailableError: there is no bwrap here; install it"


@pytest.mark.parametrize(
    ("expected", "printed", "whitespace", "tolerance", "same"),
    [
        ("1 2\n", "1  2", "tokens", None, True),
        ("1 2\n", "1\n2\n\n", "tokens", None, True),
        ("1 2\n", "1  2\n", "lines", None, False),
        ("1 2\n", "1 2  \n\n", "lines", None, True),
        ("\n1\n", "1\n", "lines", None, False),
        ("1\n", "1", "exact", None, False),
        ("0.5", "0.50000001", "tokens", 1e-6, True),
        ("0.5", "0.5001", "tokens", 1e-6, False),
        ("0.5", ".5", "tokens", None, False),
        ("x 0.5 y", "x 5e-1 y", "lines", 1e-6, True),
        ("0.5", "nan", "tokens", 1e9, False),
        ("nan", "nan", "tokens", 1e-6, True),
        ("inf", "Infinity", "tokens", 1e-6, False),
        ("10", "1_0", "tokens", 1e-6, False),
        ("yes", "no", "tokens", 1e-6, False),
        ("", "", "tokens", None, True),
        ("", "1", "tokens", None, False),
        ("1 2", "1", "tokens", None, False),
    ],
)
def test_white_space_and_numbers(expected, printed, whitespace, tolerance, same) -> None:
    assert (difference(expected, printed.encode(), whitespace, tolerance) == "") is same


def test_output_that_is_no_text_is_wrong() -> None:
    assert difference("5", b"\xff", "tokens", None) == "its output is not UTF-8"
