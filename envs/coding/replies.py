"""The code in a policy's reply."""

from __future__ import annotations

import ast
import re

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = ("", "py", "python", "python3")


def code_of(reply: str) -> str:
    """The last fenced block of Python; a reply without one is code as a whole."""
    blocks = [text for language, text in _FENCE.findall(reply) if language.lower() in PYTHON]
    return blocks[-1] if blocks else "" if "```" in reply else reply


def completed(starter: str, reply: str, entry_point: str) -> str:
    """A whole program from a reply that either goes on from the starter or says it all itself.

    Imports and helpers that the starter has before its last definition are kept in both cases.
    """
    code = code_of(reply)
    if not starter or not entry_point:
        return code
    name = entry_point.split(".")[0]
    if defines(code, name):
        head = re.search(rf"^(?:async def|def|class) {re.escape(name)}\b", starter, re.MULTILINE)
        return (starter[: head.start()] if head else "") + code
    return starter + code


def defines(code: str, name: str) -> bool:
    """Whether the code has a top-level function or class of this name, as far as it parses."""
    try:
        tree = ast.parse(code)
    # A ValueError for null bytes, a RecursionError for thousands of parentheses.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return re.search(rf"^(?:async def|def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == name for node in tree.body)


def fenced(code: str) -> str:
    """Code as a reply."""
    return f"```python\n{code.rstrip()}\n```"
