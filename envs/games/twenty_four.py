"""The game of 24: four numbers, the four operations, one value."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations, count
from typing import Any

from gymnasium.error import ResetNeeded

from envs.answers import split_of, stated
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task
from sandboxes.arithmetic import ExpressionError, evaluate, format_number

TARGET, LARGEST = 24, 13
EVAL_ONE_IN = 8
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
SYSTEM = (
    "You play the game of 24: use each of the four numbers exactly once, with +, -, *, / and parentheses, "
    "to make 24. End with a line that says nothing but: Answer: <your expression>"
)


class TwentyFourEnv(TextEnv):
    """The game of 24, with some tries: use each of four numbers once to make 24.

    The reward is 1 for an expression that does, else 0. Components: `tries`, and `wrong_numbers` for
    answers that use others than those given.
    """

    kinds = ("twenty_four",)

    def __init__(self, tries: int = 3) -> None:
        """`tries`: answers an episode may hold; after a wrong one the policy is told why.

        Raises:
            ValueError: it is below 1.
        """
        super().__init__()
        if not isinstance(tries, int) or tries < 1:
            raise ValueError(f"tries={tries!r} must be a whole number of at least 1")
        self.tries = tries
        self._numbers: list[int] | None = None
        self._left = 0

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Numbers with a solution; the four of them, in any order, decide their split."""
        rng = random.Random(f"twenty_four/{split}/{seed}")
        for place in count():
            while True:
                numbers = sorted(rng.randint(1, LARGEST) for _ in range(4))
                if split_of(f"24 {numbers}", EVAL_ONE_IN) == split and solution(numbers) is not None:
                    break
            id = f"twenty_four/{split}/{seed}/{place}"
            yield Task(id, "twenty_four", "twenty_four", split, seed, {"numbers": numbers})

    def demonstration(self, task: Task) -> list[str]:
        return [f"Answer: {solution(task.data['numbers'])}"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        self._numbers, self._left = list(task.data["numbers"]), self.tries
        question = f"Make {TARGET} of {', '.join(map(str, self._numbers))}."
        return (Message("system", SYSTEM), Message("user", question)), {"task": task}

    def step(self, action: str) -> StepResult:
        """Look at an answer.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._numbers is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        self._left -= 1
        problem, wrong_numbers = fault(stated(action), self._numbers)
        components = {"tries": 1.0, "wrong_numbers": float(wrong_numbers)}
        info = {"reward_components": components, "detail": problem}
        if not problem or not self._left:
            self._numbers = None
            return (), float(not problem), True, False, info
        return (Message("user", f"{problem} Try again."),), 0.0, False, False, info


def fault(answer: str | None, numbers: Sequence[int]) -> tuple[str, bool]:
    """What is wrong with an answer, or nothing; and whether it is that it uses other numbers."""
    if answer is None:
        return "There is no line that says Answer:", False
    if not _ALLOWED.fullmatch(answer) or "//" in answer or "**" in answer:
        return "The answer may hold numbers, +, -, *, / and parentheses alone.", False
    if Counter(number.lstrip("0") or "0" for number in re.findall(r"\d+", answer)) != Counter(
        map(str, numbers)
    ):
        return f"The answer must use each of {', '.join(map(str, numbers))} exactly once.", True
    try:
        value = evaluate(answer)
    except ExpressionError as error:
        return f"That is no expression: {error}.", False
    return ("" if value == TARGET else f"That makes {format_number(value)}."), False


def solution(numbers: Sequence[int]) -> str | None:
    """An expression that makes 24 of these numbers, found by trying all; None if there is none."""
    return _search([(Fraction(number), str(number)) for number in numbers])


def _search(terms: list[tuple[Fraction, str]]) -> str | None:
    if len(terms) == 1:
        value, text = terms[0]
        return text if value == TARGET else None
    for first, second in combinations(range(len(terms)), 2):
        (a, left), (b, right) = terms[first], terms[second]
        rest = [term for place, term in enumerate(terms) if place not in (first, second)]
        joined = [(a + b, f"({left} + {right})"), (a * b, f"({left} * {right})")]
        joined += [(a - b, f"({left} - {right})"), (b - a, f"({right} - {left})")]
        joined += [(a / b, f"({left} / {right})")] if b else []
        joined += [(b / a, f"({right} / {left})")] if a else []
        for term in joined:
            if (found := _search([*rest, term])) is not None:
                return found
    return None
