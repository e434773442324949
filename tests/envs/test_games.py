"""24 and Sudoku, against oracles that try everything."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations_with_replacement, islice, permutations, product
from typing import Any

import msgspec
import pytest

import envs
from envs.games.sudoku import emptied, read, shown, solutions
from envs.games.twenty_four import fault, solution
from sandboxes.arithmetic import evaluate


def reachable(numbers: tuple[int, ...]) -> bool:
    """Whether 24 can be made, by another way: all orders, operations and shapes of an expression."""

    def value(a: Fraction | None, operation: str, b: Fraction | None) -> Fraction | None:
        if a is None or b is None or (operation == "/" and b == 0):
            return None
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operation]

    for a, b, c, d in permutations([Fraction(number) for number in numbers]):
        for p, q, r in product("+-*/", repeat=3):
            shapes = (
                value(value(value(a, p, b), q, c), r, d),
                value(value(a, p, value(b, q, c)), r, d),
                value(value(a, p, b), q, value(c, r, d)),
                value(a, p, value(value(b, q, c), r, d)),
                value(a, p, value(b, q, value(c, r, d))),
            )
            if 24 in shapes:
                return True
    return False


def test_the_solver_of_24_finds_what_there_is() -> None:
    some = random.Random(0).sample(list(combinations_with_replacement(range(1, 14), 4)), 20)
    for numbers in some:
        found = solution(numbers)
        assert (found is not None) == reachable(numbers)
        if found is not None:
            assert evaluate(found) == 24
            assert fault(found, numbers) == ("", False)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("Answer: 4 * 6", "must use each of 1, 2, 3, 4 exactly once"),
        ("Answer: 1 * 2 * 3 + 4", "That makes 10."),
        ("Answer: 1 + 23 + 4 - 4", "exactly once"),
        ("Answer: (1 + 2 + 3", "alone"),
        ("Answer: 24", "exactly once"),
        ("1 * 2 * 3 * 4", "no line that says Answer:"),
        ("Answer: 1 * 2 * 3 ** 4", "alone"),
        ("Answer: __import__('os')", "alone"),
        ("Answer: 1 / (2 - 2)", "exactly once"),
        (f"Answer: {'(' * 5000}1 + 2 + 3 + 4", "no expression"),
    ],
)
def test_wrong_answers_of_24_are_told_why(answer: str, problem: str) -> None:
    env = envs.make("twenty_four")
    task = next(env.tasks("train", 0))
    task.data["numbers"] = [1, 2, 3, 4]
    env.reset(options={"task": task})
    messages, reward, terminated, _, info = env.step(answer)  # type: ignore[misc]
    assert not terminated
    assert reward == 0.0
    if problem != "alone" or "(" not in answer[-12:]:
        assert problem in info["detail"] or problem in messages[0].content


def test_tries_of_24_come_to_an_end(play: Any) -> None:
    env = envs.make("twenty_four", tries=2)
    task = next(env.tasks("train", 0))
    assert not play(env, task, ["no"]).done
    lost = play(env, task, ["no", "no"])
    assert lost.done
    assert lost.reward == 0.0
    assert play(env, task, ["no", *env.demonstration(task)]).components == {
        "tries": 2.0,
        "wrong_numbers": 0.0,
    }


@pytest.mark.parametrize("size", [4, 9])
def test_a_sudoku_has_one_solution(size: int) -> None:
    rng = random.Random(size)
    solved = next(solutions([0] * size * size, rng))
    puzzle = emptied(solved, rng)
    assert list(islice(solutions(puzzle), 2)) == [solved]
    assert puzzle.count(0) >= size
    box = int(size**0.5)
    rows = [solved[start : start + size] for start in range(0, size * size, size)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    boxes = [
        [rows[r + i][c + j] for i in range(box) for j in range(box)]
        for r in range(0, size, box)
        for c in range(0, size, box)
    ]
    assert all(sorted(unit) == list(range(1, size + 1)) for unit in (*rows, *columns, *boxes))


def test_every_sudoku_of_four_is_counted() -> None:
    assert sum(1 for _ in solutions([0] * 16)) == 288


def test_sudoku_answers(play: Any) -> None:
    env = envs.make("sudoku")
    task = next(env.tasks("eval", 1))
    assert task.kind == "sudoku_4"
    wrong = list(task.data["solution"])
    place = task.data["puzzle"].index(0)
    wrong[place] = wrong[place] % 4 + 1
    nearly = play(env, task, [f"Answer:\n{shown(wrong)}"])
    assert nearly.reward == 0.0
    assert nearly.components["cells_right"] == pytest.approx(1 - 1 / task.data["puzzle"].count(0))
    assert play(env, task, [shown(task.data["solution"])]).components == {"cells_right": 0.0, "readable": 0.0}
    assert read("Answer: " + "1 2 3 4 " * 5, 4) is None


def test_comparison_wants_one_word() -> None:
    env = envs.make("comparison")
    train, held_out = (list(islice(env.tasks(split, 3), 400)) for split in ("train", "eval"))  # type: ignore[arg-type]
    pairs = [{tuple(sorted(task.data["numbers"])) for task in tasks} for tasks in (train, held_out)]
    assert not pairs[0] & pairs[1]
    for task in train[:40]:
        first, second = task.data["numbers"]
        right = "first" if (max if task.kind == "larger" else min)(first, second) == first else "second"
        assert env.demonstration(task) == [right]
        for said, reward in (
            (right, 1.0),
            (f" {right.upper()}\n", 1.0),
            (f"{right}.", 0.0),
            ("first second", 0.0),
        ):
            env.reset(seed=0, options={"task": task})
            _, got, ended, *_ = env.step(said)  # type: ignore[misc]
            assert (got, ended) == (reward, True)


def test_a_sentence_has_its_words_as_they_were_given() -> None:
    env = envs.make("wording")
    train, held_out = (list(islice(env.tasks(split, 3), 400)) for split in ("train", "eval"))  # type: ignore[arg-type]
    assert not {w for t in train for w in t.data["words"]} & {w for t in held_out for w in t.data["words"]}
    assert [len(task.data["words"]) for task in train[:4]] == [1, 2, 1, 2]
    one, two = msgspec.structs.replace(train[0], data={"words": ["river"]}), train[1]
    two = msgspec.structs.replace(two, data={"words": ["river", "coin"]})
    for task, said, reward in (
        (one, "The River was cold.", 1.0),
        (one, "What a great question! The river was cold.", 0.0),
        (one, "The rivers were cold.", 0.0),
        (one, "A cold river.", 0.0),
        (one, "The river was cold", 0.0),
        (one, "river " * 10, 0.0),
        (one, "", 0.0),
        (two, "A coin lay in the river.\n", 1.0),
        (two, "A coin lay in the sea.", 0.0),
    ):
        env.reset(seed=0, options={"task": task})
        assert env.step(said)[1] == reward, said
    for task in train[:40]:
        env.reset(seed=0, options={"task": task})
        assert env.step(str(env.demonstration(task)[0]))[1] == 1.0  # type: ignore[index]
