"""Runs inside a sandbox, as a program of its own: does operations on a candidate's module, says what came of
them.

The candidate shares this process and may do with it what it likes: the answers say what it wants them to
say. They are plain values or errors, no verdicts, and what the right ones are is not known here.

A request is `{"code", "module", "tests": [[operation, …], …]}`; each test gets the module anew. An operation
is `[name, handle, argument, …]`, with arguments spelled as in `values`; handle 0 is the module. The answers
are lines: `["v", value]`, `["e", [names of built-in exceptions, the nearest first], message]`, and `["t"]`
before each test's.
"""

from __future__ import annotations

import builtins
import itertools
import json
import operator
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

from rubrics.code.values import UnplainError, decode, encode

MOST_ITEMS = 10_000
"""Items taken of what can be iterated over."""

OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "list": lambda target: list(itertools.islice(target, MOST_ITEMS)),
    "next": next,
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "int": int,
    "float": float,
    "item": operator.getitem,
    "set_item": operator.setitem,
    "delete_item": operator.delitem,
    "in": operator.contains,
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "instance": lambda target, value: isinstance(value, target),
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg")},
}


class Module:
    """A candidate's module, loaded, and the objects that somebody holds a handle on."""

    def __init__(self, code: str, name: str) -> None:
        module = types.ModuleType(name)
        self.objects: list[Any] = [module]
        # Its own classes and pickles look for it there.
        sys.modules[name] = module
        exec(compile(code, f"{name}.py", "exec", dont_inherit=True), module.__dict__)

    def do(self, operation: list[Any]) -> Any:
        """The value of an operation, spelled out."""
        name, target, *arguments = operation
        values = [decode(argument, self._find) for argument in arguments]
        return encode(OPERATIONS[name](self.objects[target], *values), self._keep)

    def _find(self, handle: Any) -> Any:
        return self.objects[handle["r"]]

    def _keep(self, value: Any) -> Any:
        for number, known in enumerate(self.objects):
            if known is value:
                return {"r": number, "type": type(value).__name__}
        self.objects.append(value)
        return {"r": len(self.objects) - 1, "type": type(value).__name__}


def attempt(work: Callable[[], Any]) -> list[Any]:
    """What came of work: a value, or an error with the built-in exceptions that it is one of."""
    try:
        return ["v", work()]
    # Whatever a candidate raises, SystemExit too, is its answer.
    except BaseException as error:  # noqa: BLE001
        names = [
            kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind
        ]
        if isinstance(error, UnplainError):
            names = ["TypeError", "Exception"]
        return ["e", names, _message(error)]


def _message(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:  # noqa: BLE001
        return type(error).__name__


def _load(held: list[Module], request: dict[str, Any]) -> None:
    held.append(Module(request["code"], request["module"]))


def main(request: dict[str, Any]) -> None:
    """Answer a request on standard output; what the candidate prints goes nowhere."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)

        def answer(content: list[Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        for operations in request["tests"]:
            answer(["t"])
            held: list[Module] = []
            failure = attempt(partial(_load, held, request))
            for operation in operations:
                answer(attempt(partial(held[0].do, operation)) if held else failure)
        # No clean-up that a candidate could have put in the way: `atexit`, threads, finalisers.
        os._exit(0)
