"""Logic puzzles: an answer is right if it solves the puzzle, whichever solution it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from k2rl.types import Verdict
from rubrics.answers import normalised
from rubrics.verifiers import ciphers, tables
from rubrics.verifiers.base import TaskError, Verifier, decided
from rubrics.verifiers.solvers import solve_24, solve_sudoku
from sandboxes.arithmetic import ExpressionError, evaluate

NO_SOLUTION = ("no solution", "impossible", "none")


class PuzzleJudge(Verifier):
    """1 if the answer solves `task.data["puzzle"]`: game of 24, sudoku, cipher, question on a table."""

    def __init__(self, field: str = "puzzle", place: str = "auto") -> None:
        super().__init__(field, place)

    async def check(self, answer: str, truth: Any) -> Verdict:
        kind = truth.get("kind") if isinstance(truth, dict) else None
        if kind not in KINDS:
            raise TaskError(f"{self.field}.kind is {kind!r}, none of: {', '.join(KINDS)}")
        try:
            problem = KINDS[kind](answer, truth)
        except (KeyError, TypeError) as error:
            raise TaskError(f"{self.field} of kind {kind}: {type(error).__name__}: {error}") from error
        return decided(not problem, problem or "solves it")


def _game_of_24(answer: str, puzzle: dict[str, Any]) -> str:
    numbers, target = [int(n) for n in puzzle["numbers"]], int(puzzle.get("target", 24))
    if not 1 <= len(numbers) <= 6:
        raise TaskError("a game of 24 has one to six numbers")
    if normalised(answer) in NO_SOLUTION:
        return "it has a solution" if solve_24(numbers, target) else ""
    expression = answer.replace("×", "*").replace("÷", "/").replace("−", "-").replace("\\times", "*")
    left, equals, right = expression.partition("=")
    if equals and right.strip() != str(target):
        return f"it says = {right.strip()[:20]}"
    if re.search(r"\*\*|//|%|\.|[^\d\s()+*/-]", left):
        return "only + - * / and parentheses are allowed"
    if re.search(r"(?:^|[-+*/(])\s*[-+]", left):
        return "signs before numbers are not operations of the game"
    used = Counter(int(n) for n in re.findall(r"\d+", left)[:50])
    if used != Counter(numbers):
        return f"it uses {sorted(used.elements())} instead of {sorted(numbers)}"
    try:
        value = evaluate(left.strip())
    except ExpressionError as error:
        return f"{error}"
    return "" if Fraction(value) == target else f"it makes {value}"


def _sudoku(answer: str, puzzle: dict[str, Any]) -> str:
    grid = puzzle["grid"]
    size = len(grid)
    box = {4: 2, 9: 3}.get(size, 0)
    if not box or any(len(row) != size for row in grid):
        raise TaskError("a sudoku is 4 x 4 or 9 x 9, with 0 for empty cells")
    if normalised(answer) in NO_SOLUTION:
        return "it has a solution" if solve_sudoku(grid) else ""
    cells = re.findall(r"\d+", answer[:2000]) if re.search(r"\d\D\d", answer) else list(answer.strip())
    if len(cells) == size and all(len(cell) == size for cell in cells):
        cells = [digit for row in cells for digit in row]
    if len(cells) != size * size or not all(cell.isdecimal() for cell in cells):
        return f"{len(cells)} cells instead of {size * size}"
    rows = [[int(cell) for cell in cells[r * size : (r + 1) * size]] for r in range(size)]
    wanted = set(range(1, size + 1))
    for r in range(size):
        for c in range(size):
            if grid[r][c] and grid[r][c] != rows[r][c]:
                return f"row {r + 1}, column {c + 1} was given as {grid[r][c]}"
    for i in range(size):
        top, left = i // box * box, i % box * box
        block = {rows[top + k // box][left + k % box] for k in range(size)}
        if set(rows[i]) != wanted or {row[i] for row in rows} != wanted or block != wanted:
            return f"row, column or box {i + 1} has a number twice"
    return ""


def _cipher(answer: str, puzzle: dict[str, Any]) -> str:
    try:
        plain = ciphers.decrypt(str(puzzle["cipher"]), str(puzzle["text"]), puzzle["key"])
    except ValueError as error:
        raise TaskError(str(error)) from error
    letters = [c for c in plain.casefold() if c.isalnum()]
    given = [c for c in answer.casefold() if c.isalnum()]
    return "" if letters and given == letters else "another text"


def _table(answer: str, puzzle: dict[str, Any]) -> str:
    try:
        return "" if tables.matches(answer, tables.solve(puzzle)) else "another answer"
    except ValueError as error:
        raise TaskError(str(error)) from error


KINDS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "24": _game_of_24,
    "sudoku": _sudoku,
    "cipher": _cipher,
    "table": _table,
}
