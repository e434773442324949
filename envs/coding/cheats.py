"""Answers that solve nothing and want to be scored, made from a solution: what a suite has to give 0."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from envs.coding.replies import code_of, fenced
from envs.tools import calling
from envs.tools.formats import parse, written


def _half(code: str) -> str:
    """The first half of the last function's body, in characters, its signature and docstring left whole."""
    tree = ast.parse(code)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    body = functions[-1].body if functions else tree.body
    documented = bool(functions) and ast.get_docstring(functions[-1]) is not None and len(body) > 1
    line = (body[1] if documented else body[0]).lineno - 1
    head = "".join(code.splitlines(keepends=True)[:line])
    rest = code[len(head) :]
    return head + rest[: len(rest) // 2]


def _with_body(body: str) -> Callable[[str], str]:
    """Every top-level function with another body, and the body alone where there is none."""

    def change(code: str) -> str:
        tree = ast.parse(code)
        found = False
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.body, found = ast.parse(body).body, True
        return ast.unparse(tree) if found else body.replace("return ", "")

    return change


_ALWAYS_EQUAL = """
class Anything(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __abs__(self): return self
    def __sub__(self, other): return self
    def __rsub__(self, other): return self
    def __lt__(self, other): return True
    def __gt__(self, other): return True
return Anything()
"""


def _each(change: Callable[[str], str]) -> Callable[[Sequence[str]], list[str]]:
    def turn_of(turn: str) -> str:
        calls = parse(turn).calls
        if not calls:
            return fenced(change(code_of(turn)))
        call = calls[0]
        if call.name != "write_file" or not call.arguments["path"].endswith(".py"):
            return turn
        path, content = call.arguments["path"], change(call.arguments["content"])
        return written(calling("write_file", path=path, content=content))

    return lambda turns: [turn_of(turn) for turn in turns]


CHEATS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "pass": _each(_with_body("pass")),
    "half": _each(_half),
    "early_exit": _each(lambda code: "import os\nos._exit(0)\n" + code),
    "early_exit_in_call": _each(_with_body("import os\nos._exit(0)")),
    "always_equal": _each(_with_body(_ALWAYS_EQUAL)),
}
