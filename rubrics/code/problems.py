"""What code is judged by: the kinds of tests that a problem may have, as records."""

from __future__ import annotations

from typing import Any

import msgspec


class CallCase(msgspec.Struct, frozen=True):
    """One call, as typed plain values (`rubrics.code.values`): arguments, and what must come of it."""

    args: Any
    expected: Any


class FunctionTests(msgspec.Struct, frozen=True, tag="function"):
    """Calls of one function, whose results are compared here, strictly by type.

    `entry_point` is a function's name, or `Class.method` of a class without constructor arguments.
    """

    entry_point: str
    cases: list[CallCase]
    #: Absolute or relative; None: floats are compared exactly.
    tolerance: float | None = None
    #: Seconds of CPU time for all calls together.
    seconds: float = 10.0


class AssertTests(msgspec.Struct, frozen=True, tag="asserts"):
    """Test code that imports the candidate, calls it and asserts: a `check(candidate)`, test functions or
    TestCases.

    The tests run in another sandbox than the candidate, which they see as `module`; `entry_point`, if there
    is one, is bound as `candidate` and by its name. `reference` is a solution that passes: it saves round
    trips, and a problem whose reference fails is a fault and never a score.
    """

    source: str
    entry_point: str = ""
    module: str = "solution"
    reference: str | None = None
    seconds: float = 10.0


class ProgramCase(msgspec.Struct, frozen=True):
    stdin: str
    expected: str


class ProgramTests(msgspec.Struct, frozen=True, tag="program"):
    """A program that reads stdin and writes stdout."""

    cases: list[ProgramCase]
    #: Numbers may differ by so much, absolute or relative; None: tokens are compared as text.
    tolerance: float | None = None
    #: `tokens`: white space only separates; `lines`: trailing white space and blank lines at the end don't
    #: count; `exact`: every byte does.
    whitespace: str = "tokens"
    #: Python source that defines `check(stdin, expected, output) -> bool`, for problems with many right
    #: answers.
    checker: str | None = None
    #: Seconds of CPU time for each case.
    seconds: float = 10.0


CodeTests = FunctionTests | AssertTests | ProgramTests
