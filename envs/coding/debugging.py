"""Find and mend a bug: write, run, read the error, try again."""

from __future__ import annotations

from typing import Any, ClassVar

from envs.base import ResetResult, StepResult
from envs.coding.judging import shared_judge
from envs.coding.problems import CodeProblem, as_data, of_data
from envs.coding.single_turn import CodeEnv
from envs.coding.tools import USAGE, Workspace, WorkspaceEnv
from envs.tools import calling
from k2rl.types import Message, Split, Task
from sandboxes.errors import SandboxFileError

FILE, TEST = "solution.py", "test_solution.py"
SYSTEM = f"You are an expert Python programmer who mends bugs.\n{USAGE}"


class DebugEnv(WorkspaceEnv, CodeEnv):
    """A file with a bug, a test that shows it, a shell and file tools; hidden tests judge the file in the
    end.

    The reward is 1 if all hidden tests pass after `submit` (or a turn without a tool call), else 0.
    Components: `tests_passed` (their share), `calls` and `bad_calls`.
    """

    kinds = ("debug",)
    default_problems: ClassVar[str] = "bugs"
    id: ClassVar[str] = "code_debug"

    def __init__(
        self, problems: str | None = None, format: str = "auto", sandbox: str = "bubblewrap"
    ) -> None:
        """`problems`: our own set (`bugs`), or a file; each has a `starter` with the bug and may have a
        `visible` test.

        Raises:
            ConfigError: one line: no such file, format or row.
        """
        super().__init__(problems, format, sandbox=sandbox)

    def task_of(self, problem: CodeProblem, split: Split, id: str, seed: int) -> Task:
        return Task(id=id, env=self.id, kind="debug", split=split, seed=seed, data=as_data(problem))

    def demonstration(self, task: Task) -> list[str | Message] | None:
        problem = of_data(task.data)
        if problem.solution is None:
            return None
        look = [calling("shell", 0, command=f"python3 {TEST}")] if problem.visible else []
        n = len(look)
        return [
            *look,
            calling("write_file", n, path=FILE, content=problem.solution),
            calling("submit", n + 1),
        ]

    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode in a sandbox of its own.

        Raises:
            SandboxError: it could not be opened.
        """
        task = self.start_episode(seed, options)
        await self.close()
        self._problem = problem = of_data(task.data)
        files = {FILE: problem.starter.encode()}
        question = f"{problem.question}\n\nThe code is in {FILE}."
        if problem.visible:
            files[TEST] = f"from solution import *\n\n{problem.visible}print('passed')\n".encode()
            question += f" `python3 {TEST}` shows the bug."
        self._workspace = await Workspace.open(shared_judge(self.sandbox).backend, files)
        return (Message("system", SYSTEM), Message("user", question)), {"task": task}

    async def judged(self, workspace: Workspace) -> StepResult:
        """What the hidden tests say of the file."""
        assert self._problem is not None
        problem, self._problem = self._problem, None
        try:
            code = (await workspace.sandbox.read_file(FILE)).decode("utf-8", "replace")
        except SandboxFileError:
            code = ""
        await self.close()
        outcome = await shared_judge(self.sandbox).judge(problem.tests, code)
        components = {"tests_passed": outcome.passed / outcome.total}
        info = {"reward_components": components, "detail": outcome.detail}
        return (), float(outcome.solved), True, False, info
