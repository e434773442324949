"""Questions on a table, spelled so that they can be computed.

`{"rows": [{"name": "Ada", "age": 36}, …], "where": [["age", ">", 30]], "select": "name", "how": "list"}`: of
the rows that meet all conditions, the column `select` as a list, or its count, sum, mean, minimum,
maximum, or the value of the row in which `by` is smallest or largest (`argmin`, `argmax`).
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rubrics.answers import normalised
from rubrics.verifiers.plain import number

Answer = Fraction | list[str]

CONDITIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
HOWS = ("list", "count", "sum", "mean", "min", "max", "argmin", "argmax")


def solve(question: dict[str, Any]) -> Answer:
    """The right answer: an exact number, or texts in any order.

    Raises:
        ValueError: the question makes no sense.
    """
    how, rows = question.get("how"), question["rows"]
    if how not in HOWS:
        raise ValueError(f"how={how!r} is none of: {', '.join(HOWS)}")
    for column, condition, value in question.get("where", []):
        if condition not in CONDITIONS:
            raise ValueError(f"condition {condition!r} is none of: {', '.join(CONDITIONS)}")
        rows = [row for row in rows if CONDITIONS[condition](row[column], value)]
    if how == "count":
        return Fraction(len(rows))
    if not rows:
        raise ValueError("no row meets the question's conditions")
    if how in ("argmin", "argmax"):
        best = (min if how == "argmin" else max)(row[question["by"]] for row in rows)
        return [str(row[question["select"]]) for row in rows if row[question["by"]] == best]
    column = [row[question["select"]] for row in rows]
    if how == "list":
        return [str(value) for value in column]
    numbers = [Fraction(str(value)) for value in column]
    if how == "mean":
        return sum(numbers, Fraction(0)) / len(numbers)
    return {
        "sum": lambda: sum(numbers, Fraction(0)),
        "min": lambda: min(numbers),
        "max": lambda: max(numbers),
    }[how]()


def matches(answer: str, right: Answer) -> bool:
    """Whether an answer says it: a number (rounded, if to two decimals or more), or just the texts."""
    if isinstance(right, Fraction):
        plain = answer.strip().rstrip(".")
        given = number(plain)
        if given is None:
            return False
        decimals = len(plain.partition(".")[2])
        rounded = decimals >= 2 and round(right, decimals) == given
        return given == right or rounded
    parts = [normalised(part) for part in re.split(r"[,;\n]|\band\b", answer)]
    return Counter(part for part in parts if part) == Counter(normalised(text) for text in right)
