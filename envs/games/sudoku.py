"""Sudoku: small and large grids, each with one solution."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import count
from math import isqrt
from typing import Any

from gymnasium.error import ResetNeeded

from envs.answers import split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task

Grid = list[int]
"""The cells of a grid, row by row; 0 is empty."""

SIZES = {"sudoku_4": 4, "sudoku_9": 9}
EMPTIED = {4: 8, 9: 40}
"""Cells that are emptied, or fewer if the solution would not be the only one."""
EVAL_ONE_IN = 8


class SudokuEnv(TextEnv):
    """A Sudoku of 4x4 or 9x9 cells, answered in one turn with the whole grid.

    The reward is 1 for the right grid, else 0. Components: `cells_right`, the share of the empty cells, and
    `readable`.
    """

    kinds = tuple(SIZES)

    def __init__(self) -> None:
        super().__init__()
        self._task: Task | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The sizes in turn; a solution decides which split it belongs to."""
        for place in count():
            id = f"sudoku/{split}/{seed}/{place}"
            rng = random.Random(id)
            kind = self.kinds[place % len(self.kinds)]
            while True:
                solved = next(solutions([0] * SIZES[kind] ** 2, rng))
                if split_of(f"sudoku {solved}", EVAL_ONE_IN) == split:
                    break
            puzzle = emptied(solved, rng)
            yield Task(id, "sudoku", kind, split, seed, {"puzzle": puzzle, "solution": solved})

    def demonstration(self, task: Task) -> list[str]:
        return [f"Answer:\n{shown(task.data['solution'])}"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        self._task = task = self.start_episode(seed, options)
        size = SIZES[task.kind]
        box = isqrt(size)
        question = (
            f"Fill the dots, so that each row, each column and each box of {box}x{box} cells holds each "
            f"of the numbers 1 to {size} once:\n{shown(task.data['puzzle'])}\n"
            "End with `Answer:` and the whole grid, in the same form."
        )
        return (Message("user", question),), {"task": task}

    def step(self, action: str) -> StepResult:
        """Look at the grid.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._task is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        data, size, self._task = self._task.data, SIZES[self._task.kind], None
        grid = read(action, size)
        right = 0.0
        if grid is not None:
            empty = [place for place, number in enumerate(data["puzzle"]) if not number]
            right = sum(grid[place] == data["solution"][place] for place in empty) / len(empty)
        components = {"cells_right": right, "readable": float(grid is not None)}
        return (), float(grid == data["solution"]), True, False, {"reward_components": components}


def shown(grid: Grid) -> str:
    """A grid as text: a line a row, dots for empty cells."""
    size = isqrt(len(grid))
    rows = (grid[start : start + size] for start in range(0, len(grid), size))
    return "\n".join(" ".join(str(number or ".") for number in row) for row in rows)


def read(text: str, size: int) -> Grid | None:
    """The grid after the last `Answer:`, or None if there is no whole one."""
    _, said, answer = text.rpartition("Answer:")
    found = re.findall(rf"[1-{size}]", answer) if said else []
    return [int(number) for number in found] if len(found) == size * size else None


def emptied(solved: Grid, rng: random.Random) -> Grid:
    """A puzzle with this solution alone."""
    size = isqrt(len(solved))
    puzzle = list(solved)
    left = EMPTIED[size]
    for place in rng.sample(range(size * size), size * size):
        if not left:
            break
        number, puzzle[place] = puzzle[place], 0
        found = solutions(puzzle)
        next(found)
        if next(found, None) is None:
            left -= 1
        else:
            puzzle[place] = number
    return puzzle


def solutions(puzzle: Grid, rng: random.Random | None = None) -> Iterator[Grid]:
    """Every solution, by trying all numbers in the cell that has the fewest; in random order with `rng`."""
    size = isqrt(len(puzzle))
    grid, box = list(puzzle), isqrt(size)
    rows, columns, boxes = [0] * size, [0] * size, [0] * size

    cells = [divmod(place, size) for place in range(size * size)]
    places = [(row, column, row // box * box + column // box) for row, column in cells]

    def mark(place: int, number: int) -> None:
        row, column, square = places[place]
        bit = 1 << number
        rows[row] ^= bit
        columns[column] ^= bit
        boxes[square] ^= bit

    def used(place: int) -> int:
        row, column, square = places[place]
        return rows[row] | columns[column] | boxes[square]

    def allowed(place: int) -> list[int]:
        taken = used(place)
        return [number for number in range(1, size + 1) if not taken >> number & 1]

    def fill() -> Iterator[Grid]:
        empty = [place for place, number in enumerate(grid) if not number]
        if not empty:
            yield list(grid)
            return
        place = max(empty, key=lambda place: used(place).bit_count())
        numbers = allowed(place)
        if rng is not None:
            rng.shuffle(numbers)
        for number in numbers:
            grid[place] = number
            mark(place, number)
            yield from fill()
            mark(place, number)
            grid[place] = 0

    for place, number in enumerate(grid):
        if number:
            mark(place, number)
    return fill()
