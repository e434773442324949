"""Puzzles: oracles that try everything, right answers, wrong ones, and answers that want to be taken for right."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubrics.verifiers import ciphers, tables
from rubrics.verifiers.puzzles import PuzzleJudge
from rubrics.verifiers.solvers import solve_24, solve_sudoku
from tests.rubrics.judging import judged

JUDGE = PuzzleJudge(place="line")
GAME = {"kind": "24", "numbers": [4, 7, 8, 8]}
GRID = [[1, 0, 0, 4], [0, 4, 1, 0], [2, 0, 4, 0], [0, 3, 0, 1]]
SUDOKU = {"kind": "sudoku", "grid": GRID}
SOLVED = "1234 3412 2143 4321"
CAESAR = {"kind": "cipher", "cipher": "caesar", "key": 3, "text": "Phhw dw grfn ilyh"}
PEOPLE = [{"name": "Ada", "age": 36}, {"name": "Bo", "age": 20}, {"name": "Cy", "age": 41}]
LIST = {"kind": "table", "rows": PEOPLE, "where": [["age", ">", 30]], "select": "name", "how": "list"}
MEAN = {"kind": "table", "rows": PEOPLE, "select": "age", "how": "mean"}


@pytest.mark.parametrize(
    ("puzzle", "answer"),
    [
        (GAME, "(7 - 8 / 8) * 4"),
        (GAME, "4*(7-8/8) = 24"),
        (GAME, "4 × (7 − 8 ÷ 8)"),
        ({"kind": "24", "numbers": [1, 1, 1, 1]}, "no solution"),
        (SUDOKU, SOLVED),
        (SUDOKU, SOLVED.replace(" ", "")),
        (SUDOKU, "1 2 3 4 | 3 4 1 2 | 2 1 4 3 | 4 3 2 1"),
        ({"kind": "sudoku", "grid": [[1, 1, 0, 0], *GRID[1:]]}, "impossible"),
        (CAESAR, "Meet at dock five"),
        (CAESAR, "meet at dock five!"),
        (LIST, "Ada and Cy"),
        (LIST, "Cy, Ada"),
        (MEAN, "97/3"),
        (MEAN, "32.33"),
        ({"kind": "table", "rows": PEOPLE, "select": "name", "by": "age", "how": "argmax"}, "Cy"),
    ],
)
def test_right(puzzle, answer):
    assert judged(JUDGE, f"Answer: {answer}", puzzle=puzzle).value == 1


@pytest.mark.parametrize(
    ("puzzle", "answer"),
    [
        (GAME, "24"),
        (GAME, "4*7-8/8"),
        (GAME, "no solution"),
        (GAME, "4 + 7 + 8 + 8 = 24"),
        (GAME, "(7-8/8)*4 = 25"),
        (GAME, "3*8"),
        (GAME, "4*(7-8/8)*1"),
        (GAME, "47 - 8 - 8"),
        (GAME, "8**(8-7)*4-8"),
        (GAME, "__import__('os').system('true') or 24"),
        (GAME, "4 * (7 - 8 / 8) + 0 * 9"),
        (GAME, "--4*(7-8/8)"),
        (GAME, "(" * 300 + "4*(7-8/8)" + ")" * 300),
        (GAME, "8/(8-8)*7*4"),
        (SUDOKU, "1234 3412 2143 4312"),
        (SUDOKU, "4321 3412 2143 1234"),
        (SUDOKU, "no solution"),
        (SUDOKU, "1234 3412 2143"),
        (SUDOKU, SOLVED + " 1"),
        (SUDOKU, "1" * 16),
        (SUDOKU, "1004 0410 2040 0301"),
        (SUDOKU, "²" * 16),
        (SUDOKU, "it is solved"),
        (SUDOKU, "12345 34125 21435 43215"),
        (CAESAR, "Phhw dw grfn ilyh"),
        (CAESAR, "Meet at dock four"),
        (CAESAR, "Meet at dock five or six"),
        (CAESAR, "..."),
        (LIST, "Ada"),
        (LIST, "Ada, Bo, Cy"),
        (LIST, "Ada, Ada, Cy"),
        (LIST, "everybody over thirty"),
        (MEAN, "32"),
        (MEAN, "32.3"),
        (MEAN, "32.34"),
        (MEAN, "nan"),
        (MEAN, "32.33 or 33.32"),
    ],
)
def test_wrong_and_hacks(puzzle, answer):
    assert judged(JUDGE, f"Answer: {answer}", puzzle=puzzle).value == 0


@pytest.mark.parametrize(
    ("puzzle", "reason"),
    [
        ({"kind": "chess"}, "none of: 24, sudoku, cipher, table"),
        ({"kind": "24"}, "KeyError"),
        ({"kind": "cipher", "cipher": "enigma", "key": 1, "text": "x"}, "none of: caesar"),
        ({"kind": "cipher", "cipher": "caesar", "key": "a", "text": "x"}, "is a number"),
        ({"kind": "table", "rows": [], "select": "a", "how": "mean"}, "no row meets"),
        ("24", "none of: 24"),
    ],
)
def test_puzzles_that_make_no_sense_are_failures(puzzle, reason):
    assert reason in judged(JUDGE, "Answer: 1", puzzle=puzzle).failure


def test_the_solver_of_24_agrees_with_trying_all_trees():
    """Three numbers, two operators, both trees: few enough to be written out."""

    def brute(numbers, target):
        import itertools
        from fractions import Fraction

        def apply(op, x, y):
            if x is None or y is None or (op == "/" and y == 0):
                return None
            return {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[op]()

        for a, b, c in itertools.permutations(map(Fraction, numbers)):
            for p, q in product("+-*/", repeat=2):
                if target in (apply(q, apply(p, a, b), c), apply(p, a, apply(q, b, c))):
                    return True
        return False

    for numbers in product(range(1, 6), repeat=3):
        for target in (6, 24):
            found = solve_24(numbers, target)
            assert (found is not None) == brute(numbers, target)
            if found:
                puzzle = {"kind": "24", "numbers": list(numbers), "target": target}
                assert judged(JUDGE, f"Answer: {found}", puzzle=puzzle).value == 1


def test_sudokus_solver():
    solved = solve_sudoku(GRID)
    assert "".join(str(cell) for row in solved for cell in row) == SOLVED.replace(" ", "")
    assert solve_sudoku([[1, 2, 3, 0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]]) is None


@given(st.text(max_size=40), st.integers(-60, 60), st.text("abcxyz", min_size=1), st.integers(2, 7))
def test_what_was_encrypted_is_decrypted(text, shift, word, rails):
    keys = {"caesar": shift, "vigenere": word, "atbash": None, "rail_fence": rails}
    keys["substitution"] = ciphers.ALPHABET[5:] + ciphers.ALPHABET[:5]
    plain = "".join(c for c in text if c.isascii())
    for cipher, key in keys.items():
        assert ciphers.decrypt(cipher, ciphers.encrypt(cipher, plain, key), key) == plain


@pytest.mark.parametrize(
    ("how", "answer"), [("count", "2"), ("sum", "77"), ("min", "36"), ("max", "41"), ("list", "36, 41")]
)
def test_tables(how, answer):
    question = {"rows": PEOPLE, "where": [["age", ">=", 36]], "select": "age", "how": how}
    assert tables.matches(answer, tables.solve(question))
