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

MOST_CHARACTERS = 1000
"""Of an answer: what is longer is none."""
MOST_DIGITS = 400
MOST_EXPONENT = 10_000

_QUOTIENT = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
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
    """The verdict where it needs no algebra: on equal numbers, different integers, and what is refused."""
    if refused := refusal(answer, truth):
        return decided(False, refused)
    given, right = _number(answer), _number(truth)
    if given is None or right is None:
        return None
    if given == right or (given.denominator == right.denominator == 1):
        return decided(given == right, f"{answer} beside {truth}")
    return None


def _number(text: str) -> Fraction | None:
    quotient = _QUOTIENT.fullmatch(text.strip())
    return number(f"{quotient[1]}/{quotient[2]}" if quotient else text)


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
