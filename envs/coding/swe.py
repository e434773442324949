"""Solve an issue in a repository, with a shell; hidden tests judge the change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from envs.base import ResetResult, StepResult
from envs.coding.judging import shared_judge
from envs.coding.problems import EVAL_ONE_IN, shuffled
from envs.coding.repositories import RepositoryTask, load_tasks, repository_of
from envs.coding.tools import USAGE, Workspace, WorkspaceEnv
from envs.tools import calling
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task
from rubrics.code.repository import judge_repository
from sandboxes.base import MIB, Sandbox
from sandboxes.errors import SandboxFileError

SYSTEM = f"You are an expert programmer who solves issues in repositories.\n{USAGE}"
MOST_FILES = 2000
MOST_CHANGED = 8 * MIB

_LIST = """
import hashlib, json, os
found = {}
for folder, folders, names in os.walk("."):
    folders[:] = [name for name in folders if name not in ("__pycache__", ".git", ".pytest_cache", ".cache")]
    for name in names:
        path = os.path.relpath(os.path.join(folder, name))
        if os.path.isfile(path) and not os.path.islink(path) and not name.endswith(".pyc"):
            with open(path, "rb") as file:
                found[path] = hashlib.sha256(file.read()).hexdigest()
print(json.dumps(found))
"""


class SweEnv(WorkspaceEnv):
    """An issue in a repository, a shell and file tools; hidden tests judge the change, in a fresh sandbox.

    The reward is 1 if all fail-to-pass and pass-to-pass tests pass with the change that there is after
    `submit` (or a turn without a tool call), else 0. Components: `tests_passed`, `changed_files`, `calls`,
    `bad_calls`.
    """

    kinds = ("swe",)

    def __init__(
        self, tasks_file: str | None = None, format: str = "auto", sandbox: str = "bubblewrap"
    ) -> None:
        """`tasks_file`: rows of ours (`k2rl swe build` makes them) or of SWE-bench; None: our own small set.

        Raises:
            ConfigError: one line: no such file, format or row, a repository that is missing.
        """
        super().__init__()
        self.sandbox = sandbox
        self.repository_tasks = load_tasks(tasks_file, format)
        self._task: RepositoryTask | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The tasks of a split in an order that the seed shuffles, again and again.

        Raises:
            ConfigError: the split has none.
        """
        chosen = [task for task in self.repository_tasks if _split_of(task) == split]
        if not chosen:
            raise ConfigError(f"swe: none of its {len(self.repository_tasks)} tasks is in the {split} split")
        for place, task in shuffled(chosen, split, seed):
            yield _as_task(task, split, f"swe/{split}/{seed}/{place}", seed)

    def all_tasks(self) -> list[Task]:
        """Every task once, as an evaluation wants them."""
        return [_as_task(task, "eval", task.id, 0) for task in self.repository_tasks]

    def demonstration(self, task: Task) -> list[str | Message] | None:
        solution = msgspec.convert(task.data, RepositoryTask).solution
        if not solution:
            return None
        turns = [
            calling("shell", n, command=f"rm -- '{path}'")
            if content is None
            else calling("write_file", n, path=path, content=content)
            for n, (path, content) in enumerate(solution.items())
        ]
        return [*turns, calling("submit", len(turns))]

    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """Begin an episode in a sandbox of its own that holds the repository.

        Raises:
            SandboxError: it could not be opened.
        """
        task = self.start_episode(seed, options)
        await self.close()
        self._task = msgspec.convert(task.data, RepositoryTask)
        self._repository = repository_of(self._task)
        backend = shared_judge(self.sandbox).backend
        self._workspace = await Workspace.open(backend, self._repository, self._task.image)
        question = (
            f"{self._task.issue}\n\nThe repository is in the working folder. Solve the issue, then submit."
        )
        return (Message("system", SYSTEM), Message("user", question)), {"task": task}

    async def judged(self, workspace: Workspace) -> StepResult:
        """What the hidden tests say of the change, in a fresh sandbox."""
        assert self._task is not None
        task, self._task = self._task, None
        changes = await changes_in(workspace.sandbox, self._repository)
        await self.close()
        if changes is None:
            return (), 0.0, True, False, {"detail": "it changed too much to be looked at"}
        backend = shared_judge(self.sandbox).backend
        outcome = await judge_repository(backend, self._repository, changes, task.tests, task.image)
        components = {
            "tests_passed": outcome.passed / max(1, outcome.total),
            "changed_files": float(len(changes)),
        }
        info = {"reward_components": components, "detail": outcome.detail}
        return (), float(outcome.solved), True, False, info


async def changes_in(sandbox: Sandbox, repository: Mapping[str, bytes]) -> dict[str, bytes | None] | None:
    """What differs in a sandbox from the repository that was put there; None if it is too much.

    Raises:
        SandboxError: the sandbox failed.
    """
    ran = await sandbox.run_python(_LIST)
    try:
        found = {str(path): str(digest) for path, digest in json.loads(ran.stdout).items()}
    except (ValueError, AttributeError, RecursionError):
        return None
    digests = {path: hashlib.sha256(content).hexdigest() for path, content in repository.items()}
    written = [path for path, digest in found.items() if digests.get(path) != digest]
    if len(written) > MOST_FILES:
        return None
    changes: dict[str, bytes | None] = {path: None for path in digests if path not in found}
    size = 0
    for path in written:
        try:
            content = await sandbox.read_file(path)
        except SandboxFileError:
            continue
        size += len(content)
        if size > MOST_CHANGED:
            return None
        changes[path] = content
    return changes


def _as_task(task: RepositoryTask, split: Split, id: str, seed: int) -> Task:
    data = msgspec.json.decode(msgspec.json.encode(task))
    return Task(id=id, env="swe", kind="swe", split=split, seed=seed, data=data)


def _split_of(task: RepositoryTask) -> Split:
    digest = hashlib.sha256(task.id.encode()).digest()
    return "eval" if int.from_bytes(digest[:4], "big") % EVAL_ONE_IN == 0 else "train"
