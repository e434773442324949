"""What a program printed, beside what it should have."""

from __future__ import annotations

import math

WHITESPACE = ("tokens", "lines", "exact")


def difference(expected: str, printed: bytes, whitespace: str, tolerance: float | None) -> str:
    """What is wrong with `printed`; empty if nothing."""
    try:
        output = printed.decode("utf-8")
    except UnicodeDecodeError:
        return "its output is not UTF-8"
    wanted, got = _parts(expected, whitespace), _parts(output, whitespace)
    for number, (one, other) in enumerate(zip(wanted, got, strict=False), start=1):
        if not _same(one, other, tolerance):
            return f"{_noun(whitespace)} {number} is {other!r:.80} instead of {one!r:.80}"
    if len(wanted) != len(got):
        return f"{len(got)} {_noun(whitespace)}s instead of {len(wanted)}"
    return ""


def _parts(output: str, whitespace: str) -> list[str]:
    if whitespace == "tokens":
        return output.split()
    if whitespace == "exact":
        return [output]
    lines = [line.rstrip() for line in output.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _noun(whitespace: str) -> str:
    return {"tokens": "token", "lines": "line"}.get(whitespace, "text")


def _same(expected: str, got: str, tolerance: float | None) -> bool:
    if expected == got:
        return True
    if tolerance is None:
        return False
    if " " in expected or "\t" in expected:
        wanted, found = expected.split(), got.split()
        return len(wanted) == len(found) and all(
            _same(one, other, tolerance) for one, other in zip(wanted, found, strict=True)
        )
    one, other = _number(expected), _number(got)
    if one is None or other is None or not (math.isfinite(one) and math.isfinite(other)):
        return False
    return abs(one - other) <= tolerance * max(1.0, abs(one))


def _number(token: str) -> float | None:
    # `float` would also take `1_0`, and any length of text.
    if len(token) > 400 or "_" in token:
        return None
    try:
        return float(token)
    except ValueError:
        return None
