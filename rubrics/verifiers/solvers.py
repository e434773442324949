"""Puzzles solved by trying."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations


def solve_24(numbers: Sequence[int], target: int) -> str | None:
    """An expression that uses each number once and makes the target; None if there is none."""
    return _combined([(Fraction(n), str(n)) for n in numbers], Fraction(target))


def _combined(values: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    if len(values) == 1:
        return values[0][1] if values[0][0] == target else None
    for i, j in permutations(range(len(values)), 2):
        (a, left), (b, right) = values[i], values[j]
        rest = [value for k, value in enumerate(values) if k not in (i, j)]
        made = [(a - b, f"({left}-{right})")]
        if i < j:
            made += [(a + b, f"({left}+{right})"), (a * b, f"({left}*{right})")]
        if b:
            made.append((a / b, f"({left}/{right})"))
        for value in made:
            if found := _combined([*rest, value], target):
                return found
    return None


def solve_sudoku(grid: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """A solution (the first found, cells with the fewest choices first); None if there is none."""
    rows = [list(row) for row in grid]
    size = len(rows)
    box = 2 if size == 4 else 3

    def choices(r: int, c: int) -> set[int]:
        top, left = r // box * box, c // box * box
        block = {rows[top + k // box][left + k % box] for k in range(size)}
        return set(range(1, size + 1)) - set(rows[r]) - {row[c] for row in rows} - block

    for r in range(size):
        for c in range(size):
            value, rows[r][c] = rows[r][c], 0
            if value and value not in choices(r, c):
                return None
            rows[r][c] = value

    def filled() -> bool:
        empty = [(r, c) for r in range(size) for c in range(size) if not rows[r][c]]
        if not empty:
            return True
        r, c = min(empty, key=lambda cell: len(choices(*cell)))
        for value in choices(r, c):
            rows[r][c] = value
            if filled():
                return True
        rows[r][c] = 0
        return False

    return rows if filled() else None
