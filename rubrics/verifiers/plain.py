"""Answers that are the right words, a number, a pattern, or JSON of a schema."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from k2rl.types import Verdict
from rubrics.answers import normalised
from rubrics.children import Children
from rubrics.verifiers.base import TaskError, Verifier, decided

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")
_QUOTIENT = re.compile(r"([-+−]?\d{1,30})\s*/\s*(\d{1,30})")


class ExactJudge(Verifier):
    """1 if the answer is the task's, or one of several, whatever its case, spaces and outer punctuation."""

    def __init__(self, field: str = "answer", place: str = "auto", strict: bool = False) -> None:
        """`strict`: every character counts."""
        super().__init__(field, place)
        self.strict = strict

    async def check(self, answer: str, truth: Any) -> Verdict:
        accepted = truth if isinstance(truth, list) else [truth]
        if not accepted or not all(isinstance(one, str | int | float) for one in accepted):
            raise TaskError(f"{self.field!r} is no text and no list of texts")
        if self.strict:
            return decided(answer in [str(one) for one in accepted], f"{answer!r:.100}")
        given = normalised(answer)
        right = bool(given) and any(given == normalised(str(one)) for one in accepted)
        return decided(right, f"{given!r:.100}")


class NumericJudge(Verifier):
    """1 if the answer is a number as close to the task's as it must be; exactly, by default."""

    def __init__(
        self,
        field: str = "answer",
        place: str = "auto",
        relative: float = 0.0,
        absolute: float = 0.0,
        unit: str = "",
    ) -> None:
        """`relative` and `absolute`: the largest difference; `unit`: may follow the number.

        Raises:
            ValueError: a difference is negative or not finite.
        """
        super().__init__(field, place)
        if not (0 <= relative < math.inf and 0 <= absolute < math.inf):
            raise ValueError("relative and absolute must be finite and not negative")
        self.relative, self.absolute, self.unit = relative, absolute, unit

    async def check(self, answer: str, truth: Any) -> Verdict:
        wanted = number(str(truth))
        if wanted is None:
            raise TaskError(f"{self.field!r} is {truth!r:.60}, not a number")
        plain = answer.strip().rstrip(".").strip("$* ")
        if self.unit:
            plain = plain.removesuffix(self.unit).strip()
        given = number(plain)
        if given is None:
            return decided(False, f"{answer!r:.60} is not a number")
        most = max(Fraction(self.relative) * abs(wanted), Fraction(self.absolute))
        return decided(abs(given - wanted) <= most, f"{plain} beside {truth}")


def number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None if it is more, less or other than one."""
    text = text.strip()
    if len(text) > 400:
        return None
    quotient = _QUOTIENT.fullmatch(text)
    if quotient:
        top, bottom = quotient[1].replace("−", "-"), int(quotient[2])
        return Fraction(int(top), bottom) if bottom else None
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(Decimal(text.replace(",", "").replace("−", "-")))
    except (InvalidOperation, ValueError, OverflowError):
        return None


class _InChildren(Verifier):
    """Checked in a process that can be killed: patterns may take for ever."""

    def __init__(self, field: str, place: str, deadline_s: float) -> None:
        super().__init__(field, place)
        if not deadline_s > 0:
            raise ValueError("deadline_s must be above 0")
        self.deadline_s = deadline_s
        self._children = Children("rubrics.verifiers.plain_child:check", size=1)

    async def _ask(self, kind: str, answer: str, truth: Any) -> Verdict:
        wrong, problem = await self._children.acall([kind, answer, truth], self.deadline_s)
        if wrong:
            raise TaskError(wrong)
        return decided(not problem, problem or "as it should be")

    async def close(self) -> None:
        self._children.close()


class RegexJudge(_InChildren):
    """1 if the whole answer matches the task's regular expression."""

    def __init__(self, field: str = "pattern", place: str = "auto", deadline_s: float = 2.0) -> None:
        super().__init__(field, place, deadline_s)

    async def check(self, answer: str, truth: Any) -> Verdict:
        return await self._ask("regex", answer, truth)


class JsonSchemaJudge(_InChildren):
    """1 if the answer is JSON, and nothing else, that the task's schema allows."""

    def __init__(self, field: str = "schema", place: str = "whole", deadline_s: float = 2.0) -> None:
        super().__init__(field, place, deadline_s)

    async def check(self, answer: str, truth: Any) -> Verdict:
        return await self._ask("json", answer, truth)
