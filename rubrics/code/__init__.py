"""Judging code that nobody trusts."""

from rubrics.code.judge import CodeJudge, JudgeError, Outcome
from rubrics.code.problems import AssertTests, CallCase, CodeTests, FunctionTests, ProgramCase, ProgramTests

__all__ = [
    "AssertTests",
    "CallCase",
    "CodeJudge",
    "CodeTests",
    "FunctionTests",
    "JudgeError",
    "Outcome",
    "ProgramCase",
    "ProgramTests",
]
