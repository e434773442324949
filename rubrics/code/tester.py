"""Runs inside a sandbox of its own: the tests of a problem, against a candidate that is somewhere else.

A test sees the candidate as a module of `Remote` objects. What it asks of them, it asks of a transcript: the
answers that the candidate's process gave to the same questions. Where the transcript ends, so does the test,
as `pending` with the question that is open. So tests and candidate are never in one process, and no value
that a test compares has a method that the candidate wrote.

With a `reference` the same questions are put to the problem's own solution, here, which tells beforehand what
the candidate will be asked; only as far as the questions do not depend on the answers, or the candidate could
read a right answer from the next question. A request is `{"source", "module", "entry_point", "reference",
"transcripts"}`; the answer a line of JSON: `[{"name", "status", "detail", "asked"}, …]`, a test each.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import random
import signal
import sys
import types
import unittest
from collections.abc import Callable
from functools import cache
from typing import Any

from rubrics.code.candidate import Module, attempt
from rubrics.code.values import decode, encode

Ask = Callable[[list[Any]], list[Any]]

CHANGED_RUN_S = 1.0
"""Seconds that a test gets with answers that are not what it expects."""


class Pending(BaseException):
    """A question to which the transcript has no answer yet."""


class Remote:
    """An object of the candidate's, of which only plain values and other such objects come here."""

    def __init__(self, link: Link, number: int) -> None:
        self.__dict__["_link"], self.__dict__["_number"] = link, number

    def _do(self, operation: str, *arguments: Any) -> Any:
        return self.__dict__["_link"].do(operation, self.__dict__["_number"], *arguments)

    def __getattr__(self, name: str) -> Any:
        # What Python looks for by itself (in copying, mocking, importing) is no question to the candidate.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return self._do("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("set", name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._do("call", list(args), kwargs)

    def __iter__(self) -> Any:
        return iter(self._do("list"))

    def __next__(self) -> Any:
        return self._do("next")

    def __len__(self) -> int:
        return int(_exact(self._do("len"), int))

    def __bool__(self) -> bool:
        return bool(_exact(self._do("bool"), bool))

    def __int__(self) -> int:
        return int(_exact(self._do("int"), int))

    def __float__(self) -> float:
        return float(_exact(self._do("float"), float))

    def __str__(self) -> str:
        return str(_exact(self._do("str"), str))

    def __repr__(self) -> str:
        return str(_exact(self._do("repr"), str))

    def __getitem__(self, key: Any) -> Any:
        return self._do("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("set_item", key, value)

    def __delitem__(self, key: Any) -> None:
        self._do("delete_item", key)

    def __contains__(self, value: Any) -> bool:
        return bool(_exact(self._do("in", value), bool))

    def __enter__(self) -> Any:
        return self._do("enter")

    def __exit__(self, *error: object) -> None:
        self._do("exit")

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(_exact(self._do("instance", value), bool))

    def __eq__(self, other: object) -> bool:
        """With another of the candidate's objects as the candidate says; with a plain value never."""
        return isinstance(other, Remote) and bool(_exact(self._do("eq", other), bool))

    def __hash__(self) -> int:
        return hash(self.__dict__["_number"])


def _binary(operation: str) -> Callable[[Remote, Any], Any]:
    return lambda self, other: self._do(operation, other)


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod"):
    setattr(Remote, f"__{_name}__", _binary(_name))


def _exact(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


class Link:
    """The way to the candidate of one test, and what was asked on it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._remotes: dict[int, Remote] = {}
        self.asked: list[list[Any]] = []
        self.pending = False

    def do(self, operation: str, number: int, *arguments: Any) -> Any:
        question = [operation, number, *(encode(argument, self._spell) for argument in arguments)]
        self.asked.append(question)
        try:
            kind, *content = self._ask(question)
        except Pending:
            self.pending = True
            raise
        if kind == "v":
            return decode(content[0], self._find)
        raise _exception(*content)

    def remote(self, number: int) -> Remote:
        return self._remotes.setdefault(number, Remote(self, number))

    def _find(self, handle: Any) -> Remote:
        return self.remote(handle["r"])

    def _spell(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return {"r": value.__dict__["_number"], "type": "Remote"}
        raise TypeError(f"a test hands the candidate a {type(value).__name__}, which is no plain value")


def _exception(names: Any, message: Any) -> Exception:
    for name in names if isinstance(names, list) else ():
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            # Some exceptions want other arguments than a message.
            return (
                kind(str(message))
                if kind not in (UnicodeDecodeError, UnicodeEncodeError)
                else ValueError(message)
            )
    return RuntimeError(str(message))


class Transcript:
    """Answers from `[question, answer]` pairs, as long as the questions are the same."""

    def __init__(self, pairs: list[list[Any]]) -> None:
        self._pairs = pairs
        self._place = 0

    def __call__(self, question: list[Any]) -> list[Any]:
        place, self._place = self._place, self._place + 1
        if place >= len(self._pairs) or self._pairs[place][0] != question:
            self._place = len(self._pairs)
            raise Pending
        return list(self._pairs[place][1])


def anything(question: list[Any]) -> list[Any]:
    """An object for an answer: to find out which tests there are."""
    return ["v", {"r": 1}]


def from_module(code: str, name: str) -> Ask:
    """Answers from a module in this process: the reference."""
    module = Module(code, name)
    return lambda question: attempt(lambda: module.do(question))


class _ModuleView(types.ModuleType):
    """What `import solution` gives a test."""

    def __init__(self, name: str, remote: Remote) -> None:
        super().__init__(name)
        self.__dict__["_remote"] = remote

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_remote"], name)


def changed(answer: list[Any]) -> list[Any]:
    """Another answer of the same kind."""
    return [answer[0], _changed(answer[1])] if answer[0] == "v" else answer


def _changed(spelled: Any) -> Any:
    if isinstance(spelled, bool):
        return not spelled
    if isinstance(spelled, int):
        return spelled + 1
    if isinstance(spelled, str):
        return spelled + "~"
    if isinstance(spelled, list):
        return [*(_changed(item) for item in spelled), 7]
    if isinstance(spelled, dict):
        tag = next(iter(spelled))
        content = spelled[tag]
        if tag in ("t", "s", "z"):
            return {tag: _changed(content)}
        if tag == "f":
            return {tag: (float.fromhex(content) + 1.5).hex()}
        if tag == "i":
            return {tag: hex(int(content, 16) + 1)}
        if tag == "d":
            return {tag: [[key, _changed(item)] for key, item in content]}
        if tag == "b":
            return {tag: content + "7e"}
    return spelled


def found_tests(request: dict[str, Any], link: Link, asserts: bool = True) -> dict[str, Callable[[], None]]:
    """The tests of the source by name, with the candidate's module in place."""
    view = _ModuleView(request["module"], link.remote(0))
    sys.modules[request["module"]] = view
    namespace: dict[str, Any] = {"__name__": "tests"}
    tree = ast.parse(request["source"])
    if not asserts:
        tree = ast.fix_missing_locations(_WithoutAsserts().visit(tree))
    exec(compile(tree, "tests.py", "exec", dont_inherit=True), namespace)
    entry = request["entry_point"]
    if entry:

        @cache
        def found_entry() -> Any:
            return getattr(view, entry)

        namespace["candidate"] = namespace[entry] = lambda *args, **kwargs: found_entry()(*args, **kwargs)
        if "check" in namespace:
            return {"check": lambda: namespace["check"](namespace["candidate"])}
    tests: dict[str, Callable[[], None]] = {}
    for name, value in namespace.items():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            for method in unittest.defaultTestLoader.getTestCaseNames(value):
                tests[f"{name}.{method}"] = lambda case=value, method=method: _run_case(case(method))  # type: ignore[misc]
        elif name.startswith("test") and isinstance(value, types.FunctionType):
            tests[name] = value
    return tests


class _WithoutAsserts(ast.NodeTransformer):
    """Makes of `assert condition` the mere condition."""

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.Expr(node.test)


def _run_case(case: unittest.TestCase) -> None:
    result = unittest.TestResult()
    unittest.TestSuite([case]).run(result)
    for _, text in [*result.errors, *result.failures]:
        raise AssertionError(text.strip().splitlines()[-1])


def _nothing(value: object) -> None:
    """What a test returns is of no interest, and need not be plain."""


def run_test(request: dict[str, Any], name: str, ask: Ask) -> dict[str, Any]:
    """One test's status: `passed`, `failed` with the detail, or `pending`."""
    link = Link(ask)
    random.seed(0)
    kind, *content = attempt(lambda: _nothing(found_tests(request, link)[name]()))
    status = "pending" if link.pending else "passed" if kind == "v" else "failed"
    detail = "" if kind == "v" else content[1]
    return {"name": name, "status": status, "detail": detail, "asked": link.asked}


def questions_whatever_the_answers(request: dict[str, Any], name: str) -> list[list[Any]]:
    """What a test asks if all answers are changed and it asserts nothing, until it breaks."""
    ask = from_module(request["reference"], request["module"])
    link = Link(lambda question: changed(ask(question)))
    random.seed(0)
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, CHANGED_RUN_S)
    try:
        attempt(lambda: _nothing(found_tests(request, link, asserts=False)[name]()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return link.asked


def _stop(number: int, frame: Any) -> None:
    raise Pending


def predicted(request: dict[str, Any], name: str) -> dict[str, Any]:
    """A test's outcome with the reference, and the questions that come first whatever the answers are."""
    outcome = run_test(request, name, from_module(request["reference"], request["module"]))
    others = questions_whatever_the_answers(request, name)
    common = 0
    for one, other in zip(outcome["asked"], others, strict=False):
        if one != other:
            break
        common += 1
    return {**outcome, "asked": outcome["asked"][:common]}


def main(request: dict[str, Any]) -> None:
    """Answer a request on standard output; what tests print goes nowhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    outcomes = []
    for index, name in enumerate(found_tests(request, Link(anything))):
        if request["reference"] is not None:
            outcomes.append(predicted(request, name))
        else:
            transcripts = request["transcripts"]
            ask = Transcript(transcripts[index] if index < len(transcripts) else [])
            outcomes.append(run_test(request, name, ask))
    answers.write(json.dumps(outcomes))
    answers.flush()
    os._exit(0)
