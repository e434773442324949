"""Whether two mathematical expressions are the same: math-verify, in processes that can be killed.

math-verify guards itself with signals, which only a main thread can have, and without them it may compute
for ever. Here it has no guards of its own; the process around it has a deadline.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction
from typing import Any

from k2rl.types import Verdict
from rubrics.children import Children
from rubrics.verifiers.base import TaskError, Verifier, decided
from rubrics.verifiers.plain import number
from sandboxes.arithmetic import ExpressionError, evaluate

MOST_CHARACTERS = 1000
"""Of an answer: what is longer is none."""
MOST_PLAIN = 100
"""Of what is computed without math-verify."""
MOST_DIGITS = 400
MOST_EXPONENT = 10_000

_FRACTION = re.compile(r"\\[dt]?frac\{([^{}\\]*)\}\{([^{}\\]*)\}")
_ASSIGNED = re.compile(r"[abckmnpqrstuvwxyz] *= *")
_SPELLED = {"\\cdot": "*", "\\times": "*", "\\div": "/", "^": "**", "{": "(", "}": ")"}
_SPELLINGS = re.compile("|".join(map(re.escape, _SPELLED)))
_ARITHMETIC = re.compile(r"[-+*/^(){}0-9. ]+")
_NOT_LATEX = ("//", "**")
_DIGITS = re.compile(rf"\d{{{MOST_DIGITS}}}")
_TOWER = re.compile(r"\^\s*\{?\s*\(?\s*(\d+)\s*\^\s*\{?\s*\(?\s*(\d+)")
_EXPONENT = re.compile(r"\^\s*\{?\s*\(?\s*(\d{5,})")
_FACTORIAL = re.compile(r"\d{4,}\s*!|!\s*!")
_ORDER = re.compile(r"<|>|\\(?:le|ge|lt|gt|leq|geq|neq|ne)(?![a-z])|≤|≥|≠|\\approx|≈|\\pm|±")


class MathJudge(Verifier):
    """1 if the answer is mathematically the same as the task's (math-verify)."""

    def __init__(
        self, field: str = "answer", place: str = "auto", deadline_s: float = 3.0, children: int = 2
    ) -> None:
        """`deadline_s` for one comparison, in one of `children` processes that all such judges share.

        Raises:
            ValueError: `place` is no such place, or a number is not above 0.
        """
        super().__init__(field, place)
        if not (deadline_s > 0 and children > 0):
            raise ValueError("deadline_s and children must be above 0")
        self.deadline_s = deadline_s
        self._children = shared_children(children)

    async def check(self, answer: str, truth: Any) -> Verdict:
        plain = decided_plainly(answer, str(truth))
        if plain is not None:
            return plain
        found = await self._children.acall([str(truth), answer], self.deadline_s)
        return outcome(found)

    def check_here(self, answer: str, truth: str) -> Verdict:
        """As `check`, for a thread that may wait."""
        plain = decided_plainly(answer, truth)
        if plain is not None:
            return plain
        return outcome(self._children.call([truth, answer], self.deadline_s))

    async def close(self) -> None:
        self._children.close()


@functools.cache
def shared_children(size: int) -> Children:
    """The processes of this driver that compare expressions."""
    return Children("rubrics.verifiers.math_child:compare", size)


def outcome(found: dict[str, Any]) -> Verdict:
    """The verdict of what a child found.

    Raises:
        TaskError: the right answer is no mathematics.
    """
    if found["truth"] is None:
        raise TaskError("the task's answer cannot be read as mathematics")
    same = bool(found["same"])
    read = found["answer"]
    return decided(same, f"{read} {'is' if same else 'is not'} {found['truth']}" if read else found["why"])


def decided_plainly(answer: str, truth: str) -> Verdict | None:
    """The verdict where it needs no algebra: on numbers that can be computed exactly, and what is refused.

    A decimal may be a rounded value, so that it is left to math-verify where it is another number.
    """
    if refused := refusal(answer, truth):
        return decided(False, refused)
    given, right = _number(_ASSIGNED.sub("", answer.strip(), count=1)), _number(truth)
    if given is None or right is None:
        return None
    whole = given.denominator == right.denominator == 1
    if given == right or whole or "." not in answer + truth:
        return decided(given == right, f"{answer} beside {truth}")
    return None


def _number(text: str) -> Fraction | None:
    """The number that a text is, or that its arithmetic comes to; None if it is anything else."""
    plain = number(text)
    if plain is not None or len(text) > MOST_PLAIN:
        return plain
    spelled, fractions = text, 1
    while fractions:
        spelled, fractions = _FRACTION.subn(r"((\1)/(\2))", spelled)
    bare = _SPELLINGS.sub(lambda found: _SPELLED[found[0]] if found[0][0] == "\\" else found[0], spelled)
    if not _ARITHMETIC.fullmatch(bare) or any(other in spelled for other in _NOT_LATEX):
        return None
    try:
        return Fraction(evaluate(_SPELLINGS.sub(lambda found: _SPELLED[found[0]], bare)))
    except ExpressionError:
        return None


def refusal(answer: str, truth: str) -> str:
    """Why an answer is wrong before anybody computes with it; empty: it may be right."""
    if answer.split() == truth.split():
        return ""
    if len(answer) > MOST_CHARACTERS:
        return f"an answer of {len(answer)} characters"
    if _DIGITS.search(answer):
        return f"a number of over {MOST_DIGITS} digits"
    towers = any(power_above(int(b), int(c)) for b, c in _TOWER.findall(answer) if len(b) + len(c) < 20)
    long_towers = any(len(b) + len(c) >= 20 for b, c in _TOWER.findall(answer))
    if towers or long_towers or _EXPONENT.search(answer) or _FACTORIAL.search(answer):
        return "a number that is too large to be computed"
    if _ORDER.search(answer) and not _ORDER.search(truth):
        return "an order or approximation instead of a value"
    return ""


def power_above(base: int, exponent: int) -> bool:
    """Whether `base ** exponent` is above what an exponent may be."""
    if base < 2:
        return False
    return exponent > 64 or base**exponent > MOST_EXPONENT
