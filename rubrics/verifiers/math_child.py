"""Runs in a child process: math-verify's comparison, and what it lets through that it should not."""

from __future__ import annotations

import functools
import logging
from typing import Any

import sympy
from math_verify import parse, verify
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from sympy.polys.polyerrors import BasePolynomialError

logging.disable(logging.WARNING)

WARMING = [
    ("\\frac{1}{2}", "0.5"),
    ("12", "x = 3 \\cdot 4"),
    ("\\sqrt{8}+1", "2\\sqrt{2}+1"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(1,3)"),
    ("\\sin(\\pi/6)", "\\frac{1}{2}"),
    ("x>2", "x<2"),
    ("\\text{a}", "\\log_2 8"),
]
PLAIN_TYPES = (sympy.Add, sympy.Mul, sympy.Pow, sympy.Integer, sympy.Rational)
DIGITS, APART = 20, 1e-6
STATEMENTS = (Relational, BooleanAtom, BooleanFunction)


def compare(pair: list[str]) -> dict[str, Any]:
    """Whether an answer (`pair[1]`) is the truth (`pair[0]`): `same`, and how both were read."""
    truth, answer = pair
    right = _parsed(truth)
    read = _parsed(answer)
    if truth.count("{") != truth.count("}"):
        right = ()
    found = {"truth": _text(right), "answer": _text(read), "same": False, "why": "not mathematics"}
    if right and read and not _evades(right[0], read[0]):
        same = _decided(right[0], read[0])
        if same is None:
            same = bool(verify(list(right), list(read), timeout_seconds=None, raise_on_error=True))
        found["same"] = same
    return found


def warm_up() -> None:
    """Fill the parser's and sympy's caches, which every process forked from here begins with."""
    for truth, answer in WARMING:
        compare([truth, answer])


@functools.lru_cache(4096)
def _parsed(text: str) -> tuple[Any, ...]:
    return tuple(parse(f"$\\boxed{{{text}}}$", parsing_timeout=None, raise_on_error=False))


def _text(parsed: tuple[Any, ...]) -> str | None:
    return None if not parsed else str(parsed[-1])[:200]


def _decided(right: Any, read: Any) -> bool | None:
    """Whether they are the same, where a look at their difference is a proof; None: it takes math-verify.

    Polynomials with rational coefficients are the same if they cancel out, and constants are not if they are
    far apart. What math-verify is lenient in (decimals, percentages, names run together) is left to it.
    """
    if not all(type(value) in PLAIN_TYPES for value in (right, read)):
        return None
    if any(value.has(sympy.Float, sympy.UnevaluatedExpr, sympy.zoo, sympy.nan) for value in (right, read)):
        return None
    symbols = right.free_symbols | read.free_symbols
    if any(len(symbol.name) > 1 for symbol in symbols):
        return None
    difference = right.doit() - read.doit()
    if symbols:
        try:
            return bool(sympy.Poly(difference, *sorted(symbols, key=str), domain="QQ").is_zero)
        except BasePolynomialError:  # it is none, or has other coefficients
            return None
    value = difference.evalf(DIGITS)
    return False if value.is_Float and value.is_finite and abs(value) > APART else None


def _evades(right: Any, read: Any) -> bool:
    """An equation instead of a value is `x = value`, and no chain: its last member would count alone.

    A value is no text, and has no names in it that the right one has not: those are answers to no question.
    """
    if isinstance(right, (*STATEMENTS, str)):
        return False
    if isinstance(read, STATEMENTS):
        return not (isinstance(read, sympy.Eq) and read.lhs.is_Symbol and not _names(right, read.rhs))
    if isinstance(right, sympy.FiniteSet) != isinstance(read, sympy.FiniteSet):
        return True
    return not isinstance(read, str) and _names(right, read)


def _names(right: Any, read: Any) -> bool:
    """Whether `read` has names that `right` has not; a number in `\\text{}` is read as a name."""
    names = {str(symbol) for symbol in getattr(read, "free_symbols", ())}
    known = {str(symbol) for symbol in getattr(right, "free_symbols", ())}
    return any(not name.strip().isdecimal() for name in names - known)
