"""Write a function or a program in one turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from gymnasium.error import ResetNeeded

from envs.base import ResetResult, StepResult, TextEnv
from envs.coding.judging import shared_judge
from envs.coding.problems import CodeProblem, as_data, load_problems, of_data, released_between, shuffled
from envs.coding.replies import code_of, completed, fenced
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task
from rubrics.code import ProgramTests


class CodeEnv(TextEnv):
    """Write code in one turn; it is run against tests in a sandbox.

    The reward is 1 if all tests pass, else 0. Components: `tests_passed` (their share) and `has_code`.
    """

    kinds: tuple[str, ...] = ("function", "program")
    default_problems: ClassVar[str] = "functions"
    id: ClassVar[str] = "code_function"

    def __init__(
        self,
        problems: str | None = None,
        format: str = "auto",
        since: str | None = None,
        until: str | None = None,
        sandbox: str = "bubblewrap",
    ) -> None:
        """`problems`: a set of ours (`functions`, `contests`, `bugs`), `humaneval` (the installed package),
        or a file, whose `format` is found out or named; `since`, `until`: a window of release dates.

        Raises:
            ConfigError: one line: no such file, format, row or date.
        """
        super().__init__()
        self.sandbox = sandbox
        self.problems = released_between(
            load_problems(problems or self.default_problems, format), since, until
        )
        self._problem: CodeProblem | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The problems of a split in an order that the seed shuffles, again and again.

        Raises:
            ConfigError: the split has none.
        """
        chosen = [problem for problem in self.problems if problem.split == split]
        if not chosen:
            raise ConfigError(f"{self.id}: none of its {len(self.problems)} problems is in the {split} split")
        for place, problem in shuffled(chosen, split, seed):
            yield self.task_of(problem, split, f"{self.id}/{split}/{seed}/{place}", seed)

    def all_tasks(self) -> list[Task]:
        """Every problem once, as an evaluation wants them."""
        return [self.task_of(problem, "eval", problem.id, 0) for problem in self.problems]

    def task_of(self, problem: CodeProblem, split: Split, id: str, seed: int) -> Task:
        """A problem as a task."""
        kind = "program" if isinstance(problem.tests, ProgramTests) else "function"
        return Task(id=id, env=self.id, kind=kind, split=split, seed=seed, data=as_data(problem))

    def demonstration(self, task: Task) -> list[str | Message] | None:
        solution = of_data(task.data).solution
        return None if solution is None else [fenced(solution)]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> ResetResult:
        task = self.start_episode(seed, options)
        self._problem = of_data(task.data)
        return (Message("system", SYSTEM), Message("user", prompt(self._problem))), {"task": task}

    async def step(self, action: str) -> StepResult:  # type: ignore[override]
        """Judge the code of the reply.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
            JudgeError, SandboxError: the judge failed; there is no reward.
        """
        if self._problem is None:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        problem, self._problem = self._problem, None
        code = program_of(problem, action)
        has_code = bool(code_of(action).strip())
        outcome = await shared_judge(self.sandbox).judge(problem.tests, code)
        solved = outcome.solved and has_code
        share = outcome.passed / outcome.total
        components = {"tests_passed": share, "has_code": float(has_code)}
        return (), float(solved), True, False, {"reward_components": components, "detail": outcome.detail}


class ContestEnv(CodeEnv):
    """Write a program that reads stdin and writes stdout, in one turn; problems have release dates."""

    default_problems = "contests"
    id = "code_contest"


SYSTEM = "You are an expert Python programmer. Answer with one fenced block of Python code."


def prompt(problem: CodeProblem) -> str:
    """The question as the policy reads it."""
    if isinstance(problem.tests, ProgramTests):
        return (
            f"{problem.question}\n\nWrite a Python program that reads standard input and prints the answer."
        )
    if problem.starter and problem.starter.strip() != problem.question.strip():
        return f"{problem.question}\n\nUse this:\n{fenced(problem.starter)}"
    if problem.starter:
        return f"Complete this function:\n{fenced(problem.starter)}"
    return f"{problem.question}\n\nName the function `{_entry_point(problem)}`."


def program_of(problem: CodeProblem, reply: str) -> str:
    """What is judged: the reply's code, with what the problem puts before it."""
    if isinstance(problem.tests, ProgramTests):
        return code_of(reply)
    return completed(problem.starter, reply, _entry_point(problem))


def _entry_point(problem: CodeProblem) -> str:
    return "" if isinstance(problem.tests, ProgramTests) else problem.tests.entry_point
