"""Word problems to be solved with a calculator."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

from gymnasium.error import ResetNeeded

from envs.answers import last_number_is, split_of
from envs.base import ResetResult, StepResult, TextEnv
from k2rl.types import Message, Split, Task
from sandboxes.arithmetic import ExpressionError, evaluate, format_number

SYSTEM_PROMPT = (
    "You solve problems with a calculator. Write calc(EXPRESSION) to use it, "
    "wait for the result, then give the final number."
)

NAMES = (
    *("Ada", "Ali", "Amy", "Ana", "Ben", "Bob", "Eva", "Ian", "Ida", "Ivan", "Jack", "Jane"),
    *("Kim", "Leo", "Li", "Lily", "Lucy", "Max", "Mia", "Nina", "Noah", "Omar", "Rosa", "Sam", "Tom", "Zoe"),
)
THINGS = (
    *("apples", "balls", "beads", "books", "buttons", "cards", "coins", "cups", "eggs", "flowers", "keys"),
    *("lemons", "marbles", "nuts", "pears", "pencils", "plums", "shells", "stamps", "stones", "tickets"),
)
EVAL_ONE_IN = 8
"""One arithmetic problem in so many belongs to the eval split, all others to train."""


class Problem(NamedTuple):
    """A kind of word problem: what to compute, and ways to ask for it."""

    expression: str
    questions: tuple[str, ...]


PROBLEMS = {
    "add": Problem(
        "{a} + {b}",
        (
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have?",
            "{name} finds {a} {things} on Monday and {b} on Tuesday. How many {things} is that?",
            "There are {a} {things} in a box and {b} in a bag. How many {things} are there?",
        ),
    ),
    "subtract": Problem(
        "{a} - {b}",
        (
            "{name} has {a} {things} and gives away {b}. How many {things} are left?",
            "A shop has {a} {things} and sells {b} to {name}. How many {things} remain?",
            "There were {a} {things} in a box. {name} took {b}. How many {things} are still there?",
        ),
    ),
    "multiply": Problem(
        "{c} * {a}",
        (
            "{name} has {c} boxes with {a} {things} each. How many {things} are there?",
            "Each of {c} bags holds {a} {things}. How many {things} are in all the bags?",
        ),
    ),
    "add_subtract": Problem(
        "{a} + {b} - {c}",
        (
            "{name} has {a} {things}, finds {b}, then loses {c}. How many {things} does {name} have now?",
            "A box holds {a} {things}. {name} adds {b} and takes out {c}. How many {things} are in it?",
        ),
    ),
    "multiply_add": Problem(
        "{c} * {a} + {b}",
        (
            "{name} buys {c} bags of {a} {things} and {b} loose {things}. How many {things} in total?",
            "{name} fills {c} boxes with {a} {things} each and has {b} left over. How many {things} is that?",
        ),
    ),
}

_CALL = re.compile(r"\bcalc\(")


class CalculatorEnv(TextEnv):
    """Word problems, easy to hard, to be solved with the tool `calc(EXPRESSION)`.

    The policy calls the calculator, reads its answer (a `tool` message: the number, or `error: …`), and
    ends the episode with a turn that calls nothing: the final answer. Of several calls in one turn the
    first counts. A call beyond `max_calls` ends the episode unanswered.

    The reward is 1 if a call succeeded and the last number of the final answer is the right one, else 0.
    Components: `tool_used` (a call succeeded) and `answer_correct`.
    """

    kinds = tuple(PROBLEMS)

    def __init__(self, mix: Mapping[str, float] | None = None, max_calls: int = 2) -> None:
        """`mix` gives each kind its share of the training tasks (default: all equal; kinds left out
        get none); `max_calls` is how many calls, failed ones included, an episode may make.

        Raises:
            ValueError: if the mix is not a dict of shares of known kinds, or `max_calls` < 1.
        """
        super().__init__()
        if not isinstance(max_calls, int) or max_calls < 1:
            raise ValueError(f"max_calls={max_calls!r} must be a whole number of at least 1")
        self.max_calls = max_calls
        self.mix = _checked_mix(mix if mix is not None else dict.fromkeys(self.kinds, 1.0))
        self._task: Task | None = None
        self._calls = 0
        self._tool_used = False

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """Training tasks follow `mix`; evaluation tasks take the kinds in turn, whatever the mix.

        The splits share no arithmetic problem: its operands decide which split it belongs to.
        """
        for index in count():
            name = f"calculator/{split}/{seed}/{index}"
            task_seed = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
            rng = random.Random(task_seed)
            if split == "eval":
                kind = self.kinds[index % len(self.kinds)]
            else:
                kind = rng.choices(list(self.mix), weights=list(self.mix.values()))[0]
            data = _word_problem(kind, split, rng)
            yield Task(id=name, env="calculator", kind=kind, split=split, seed=task_seed, data=data)

    def demonstration(self, task: Task) -> list[str]:
        return [f"calc({task.data['expression']})", f"The answer is {task.data['answer']}."]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        self._task = self.start_episode(seed, options)
        self._calls = 0
        self._tool_used = False
        question = Message(role="user", content=self._task.data["question"])
        return (Message(role="system", content=SYSTEM_PROMPT), question), {"task": self._task}

    def step(self, action: str) -> StepResult:
        """Answer a call, or score the final answer.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
        """
        if self._task is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        call = _CALL.search(action)
        if call is None:
            correct = last_number_is(action, self._task.data["answer"])
            return self._end(correct=correct)
        if self._calls == self.max_calls:
            return self._end(correct=False)
        self._calls += 1
        reply, succeeded = _calculate(_argument(action, call.end()))
        first_success = succeeded and not self._tool_used
        self._tool_used |= succeeded
        components = {"tool_used": float(first_success), "answer_correct": 0.0}
        return (Message(role="tool", content=reply),), 0.0, False, False, {"reward_components": components}

    def _end(self, *, correct: bool) -> StepResult:
        self._task = None
        components = {"tool_used": 0.0, "answer_correct": float(correct)}
        return (), float(correct and self._tool_used), True, False, {"reward_components": components}


def _checked_mix(mix: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(mix, Mapping):
        raise ValueError(f"mix={mix!r} must be a dict of kinds and their shares")
    unknown = [kind for kind in mix if kind not in PROBLEMS]
    if unknown:
        raise ValueError(f"mix has unknown kinds: {', '.join(unknown)}; there are: {', '.join(PROBLEMS)}")
    shares = {kind: float(share) for kind, share in mix.items()}
    if not all(math.isfinite(share) and share >= 0 for share in shares.values()) or sum(shares.values()) <= 0:
        raise ValueError(f"mix={dict(mix)} must give shares of at least 0, and one kind more than 0")
    return shares


def _word_problem(kind: str, split: Split, rng: random.Random) -> dict[str, Any]:
    """A problem of this kind and split; its answer is positive and does not stand in the question."""
    problem = PROBLEMS[kind]
    while True:
        a, b, c = rng.randint(12, 99), rng.randint(12, 99), rng.randint(3, 30)
        if kind == "subtract":
            a, b = max(a, b) + 1, min(a, b)
        expression = problem.expression.format(a=a, b=b, c=c)
        answer = int(evaluate(expression))
        operands = sorted(int(operand) for operand in re.findall(r"\d+", expression))
        if answer <= 0 or answer in operands or _split_of(kind, operands, answer) != split:
            continue
        words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
        question = rng.choice(problem.questions).format(a=a, b=b, c=c, **words)
        return {"question": question, "expression": expression, "answer": answer}


def _split_of(kind: str, operands: list[int], answer: int) -> Split:
    """The split of a problem; the same for `a + b` and `b + a`, so that neither gives away the other."""
    return split_of(f"{kind} {operands} {answer}", EVAL_ONE_IN)


def _argument(action: str, start: int) -> str | None:
    """What stands between the parentheses of a call, or None if they are not closed."""
    depth = 1
    for end in range(start, len(action)):
        depth += (action[end] == "(") - (action[end] == ")")
        if depth == 0:
            return action[start:end]
    return None


def _calculate(expression: str | None) -> tuple[str, bool]:
    """The calculator's reply, and whether it is a result."""
    if expression is None:
        return "error: missing )", False
    try:
        return format_number(evaluate(expression)), True
    except ExpressionError as error:
        return f"error: {error}", False
