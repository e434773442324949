"""Problems of number theory and counting, to be solved with Python in a sandbox."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count
from math import comb, gcd
from typing import Any, NamedTuple

from envs.answers import last_number_is, split_of
from envs.base import Messages, ResetResult
from envs.coding.judging import shared_judge
from envs.tools import ToolEnv, calling, tool
from k2rl.types import Message, Split, Task
from sandboxes.base import Limits, Sandbox, SandboxSpec

SECONDS = 10.0
EVAL_ONE_IN = 8
SYSTEM = (
    "You solve problems with Python. The tool `python` runs a whole program and shows what it prints. "
    "End with the answer, a whole number, as the last number that you write."
)


class Problem(NamedTuple):
    """A kind of problem: what is asked, and a program whose printed number is the answer."""

    question: str
    program: str
    draw: Callable[[random.Random], dict[str, int]]
    solve: Callable[..., int]


def _drawing(**ranges: tuple[int, int]) -> Callable[[random.Random], dict[str, int]]:
    return lambda rng: {name: rng.randint(*between) for name, between in ranges.items()}


def _multiples(a: int, b: int, n: int) -> int:
    """By inclusion and exclusion."""
    return n // a + n // b - n // (a * b // gcd(a, b))


def _partitions(k: int, n: int) -> int:
    """One part size after the other."""
    ways = [1] + [0] * n
    for part in range(1, k + 1):
        for total in range(part, n + 1):
            ways[total] += ways[total - part]
    return ways[n]


def _prime_after(n: int) -> int:
    return next(p for p in count(n + 1) if all(p % d for d in range(2, int(p**0.5) + 1)))


def _ternary_words(n: int) -> int:
    """Words end in a or in another letter; a follows the others alone."""
    ends_in_a, others = 1, 2
    for _ in range(n - 1):
        ends_in_a, others = others, 2 * (ends_in_a + others)
    return ends_in_a + others


PROBLEMS = {
    "multiples": Problem(
        "How many of the numbers from 1 to {n} are multiples of {a} or of {b}?",
        "print(sum(x % {a} == 0 or x % {b} == 0 for x in range(1, {n} + 1)))",
        _drawing(a=(3, 40), b=(3, 40), n=(2000, 90000)),
        _multiples,
    ),
    "digit_sum": Problem(
        "What is the sum of the decimal digits of {a} to the power of {n}?",
        "print(sum(map(int, str({a} ** {n}))))",
        _drawing(a=(3, 99), n=(20, 400)),
        lambda a, n: sum(int(digit) for digit in f"{a**n}"),
    ),
    "last_digits": Problem(
        "What is the remainder of {a} to the power of {n}, divided by {m}?",
        "print(pow({a}, {n}, {m}))",
        _drawing(a=(2, 9999), n=(10**4, 10**9), m=(1001, 99999)),
        lambda a, n, m: pow(a, n, m),
    ),
    "partitions": Problem(
        "In how many ways is {n} a sum of whole numbers from 1 to {k}, regardless of order?",
        "w = [1] + [0] * {n}\nfor p in range(1, {k} + 1):\n    for t in range(p, {n} + 1):\n"
        "        w[t] += w[t - p]\nprint(w[{n}])",
        _drawing(k=(3, 12), n=(30, 150)),
        _partitions,
    ),
    "prime_after": Problem(
        "What is the smallest prime number above {n}?",
        "p = {n} + 1\nwhile any(p % d == 0 for d in range(2, int(p ** 0.5) + 1)):\n    p += 1\nprint(p)",
        _drawing(n=(10**4, 10**7)),
        _prime_after,
    ),
    "paths": Problem(
        "How many shortest ways lead from one corner of a grid of {a} by {b} squares to the opposite corner?",
        "from math import comb\nprint(comb({a} + {b}, {a}))",
        _drawing(a=(4, 18), b=(4, 18)),
        lambda a, b: comb(a + b, a),
    ),
    "words": Problem(
        "How many words of {n} letters a, b and c are there in which no two a's are neighbours?",
        "x, y = 1, 2\nfor _ in range({n} - 1):\n    x, y = y, 2 * (x + y)\nprint(x + y)",
        _drawing(n=(5, 60)),
        _ternary_words,
    ),
}


class PythonMathEnv(ToolEnv):
    """Problems of number theory and counting, to be solved with the tool `python`, a sandbox.

    The reward is 1 if the last number of the final answer is right, else 0. Component: `answer_correct`.
    """

    kinds = tuple(PROBLEMS)

    def __init__(self, format: str = "auto", sandbox: str = "bubblewrap") -> None:
        """`sandbox`: the backend where programs run.

        Raises:
            ConfigError: there is no such format of tool calls.
        """
        super().__init__(format)
        self._backend = sandbox
        self._sandbox: Sandbox | None = None
        self._answer = 0

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The kinds in turn; a problem's numbers decide which split it belongs to."""
        for place in count():
            id = f"python_math/{split}/{seed}/{place}"
            rng, kind = random.Random(id), self.kinds[place % len(self.kinds)]
            problem = PROBLEMS[kind]
            while True:
                numbers = problem.draw(rng)
                if split_of(f"{kind} {sorted(numbers.items())}", EVAL_ONE_IN) == split:
                    break
            data = {"question": problem.question.format(**numbers), "numbers": numbers}
            yield Task(id, "python_math", kind, split, seed, {**data, "answer": problem.solve(**numbers)})

    def demonstration(self, task: Task) -> list[str | Message]:
        code = PROBLEMS[task.kind].program.format(**task.data["numbers"])
        return [calling("python", code=code), f"The answer is {task.data['answer']}."]

    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode; the sandbox of the last one is ended."""
        await self.close()
        begun = super().reset(seed=seed, options=options)
        assert isinstance(begun, tuple)
        return begun

    def begin(self, task: Task) -> Messages:
        self._answer = task.data["answer"]
        return (Message("system", SYSTEM), Message("user", task.data["question"]))

    @tool(timeout_s=3 * SECONDS)
    async def python(self, code: str) -> str:
        """Run a Python program; gives what it prints. Files stay from one call to the next, variables don't.

        Args:
            code: the whole program
        """
        if self._sandbox is None:
            limits = Limits(wall_seconds=SECONDS, cpu_seconds=SECONDS, output_bytes=2**20)
            self._sandbox = await shared_judge(self._backend).backend.open(SandboxSpec(limits=limits))
        ran = await self._sandbox.run_python(code.encode("utf-8", "replace").decode())
        said = (ran.text + ran.stderr.decode("utf-8", "replace")).rstrip("\n")
        if ran.ended != "exited":
            return f"{said}\n[{ran.ended.replace('_', ' ')}]".lstrip()
        return f"{said}\n[exit code {ran.exit_code}]".lstrip() if ran.exit_code or not said else said

    def answer(self, text: str) -> Messages:
        right = float(last_number_is(text, self._answer))
        return self.end(right, {"answer_correct": right})

    async def close(self) -> None:  # type: ignore[override]
        """End the episode's sandbox."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await sandbox.close()
