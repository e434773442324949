"""Repository tasks from the history of a git repository: commits that change code and tests together.

A commit becomes a task if some of its tests fail on the code before it and pass on the code after it, both
tried out in a sandbox. The issue is the commit's message: look at the messages before you train on them.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from envs.coding.repositories import RepositoryTask, git, git_archive, read_snapshot
from k2rl.errors import ConfigError
from rubrics.code import JudgeError
from rubrics.code.repository import Report, RepositoryTests, may_change, run_tests
from sandboxes import registry
from sandboxes.base import Backend
from sandboxes.errors import SandboxError

INLINE = 2**18
"""Bytes of a repository up to which it is part of its row; larger ones are in a file."""


@dataclass(frozen=True)
class Commit:
    """One commit with a single parent; what it changes is text, path -> content after it."""

    id: str
    parent: str
    date: str
    message: str
    code: dict[str, bytes | None]
    tests: dict[str, bytes]


def is_test(path: str) -> bool:
    """Whether pytest would look for tests in a file of this name."""
    name = PurePosixPath(path).name
    return name.endswith(".py") and (name.startswith("test_") or name.endswith("_test.py"))


def commits(repository: Path, limit: int) -> Iterator[Commit]:
    """The newest commits that change Python code and tests, newest first; at most `limit` are looked at.

    Raises:
        ConfigError: it is no git repository.
    """
    listed = git(
        repository, "log", "--no-merges", f"--max-count={limit}", "--format=%H%x00%P%x00%cs%x00%B%x01"
    )
    for entry in listed.decode("utf-8", "replace").split("\x01"):
        parts = entry.strip("\n").split("\x00")
        if len(parts) != 4 or not parts[1]:
            continue
        id, parent, date, message = parts
        names = git(repository, "diff", "--no-renames", "--name-status", "-z", parent, id).decode(
            "utf-8", "replace"
        )
        fields = names.split("\x00")
        changes = {
            path: None if status == "D" else git(repository, "show", f"{id}:{path}")
            for status, path in zip(fields[::2], fields[1::2], strict=False)
        }
        tests = {path: content for path, content in changes.items() if is_test(path) and content is not None}
        code = {path: content for path, content in changes.items() if not is_test(path)}
        if tests and any(path.endswith(".py") for path in code):
            yield Commit(id, parent, date, message.strip(), code, tests)


async def task_of(backend: Backend, repository: Path, commit: Commit, seconds: float) -> RepositoryTask | str:
    """The task that a commit makes, or why it makes none.

    Raises:
        JudgeError, SandboxError: it could not be tried out.
    """
    try:
        texts = {path: content.decode("utf-8") for path, content in commit.tests.items()}
        solution = {
            path: None if content is None else content.decode("utf-8")
            for path, content in commit.code.items()
        }
    except UnicodeDecodeError:
        return "it changes what is no text"
    before = read_snapshot(f"{repository}@{commit.parent}")
    tests = RepositoryTests(texts, (), seconds=seconds, checks_equality=False)
    solution = {path: text for path, text in solution.items() if may_change(path, tests)}
    change = {path: None if text is None else text.encode() for path, text in solution.items()}
    old = await run_tests(backend, before, {}, tests)
    new = await run_tests(backend, before, change, tests)
    if new.problem:
        return new.problem
    passing = {test for test, outcome in new.outcomes.items() if outcome == "passed"}
    fail_to_pass = tuple(sorted(test for test in passing if old.outcomes.get(test) != "passed"))
    if not fail_to_pass:
        return "no test fails before it and passes after it"
    pass_to_pass = tuple(sorted(passing - set(fail_to_pass)))
    chosen = RepositoryTests(texts, fail_to_pass, pass_to_pass, seconds=seconds)
    # A second time, with the check for objects that equal everything: some tests need such (`mock.ANY`).
    strict = await run_tests(backend, before, change, chosen)
    if not _all_pass(strict, chosen):
        chosen = msgspec.structs.replace(chosen, checks_equality=False)
        if not _all_pass(await run_tests(backend, before, change, chosen), chosen):
            return "its tests do not pass each time"
    name = f"{repository.name}-{commit.id[:10]}"
    return RepositoryTask(
        name,
        commit.message,
        chosen,
        files={path: _spelled(content) for path, content in before.items()},
        solution=solution,
        tags=(repository.name,),
        released=commit.date,
    )


async def build_here(
    repository: Path, out: Path, *, sandbox: str, limit: int, seconds: float, say: Callable[[str], None]
) -> int:
    """`build` with a backend by name.

    Raises:
        ConfigError: as `build`; or the backend or the judge cannot work here.
    """
    try:
        backend = registry.create(sandbox)
        try:
            return await build(backend, repository, out, limit=limit, seconds=seconds, say=say)
        finally:
            await backend.close()
    except (ValueError, SandboxError, JudgeError) as error:
        raise ConfigError(f"no tasks were made: {error}") from error


def _all_pass(report: Report, tests: RepositoryTests) -> bool:
    return all(report.outcomes.get(test) == "passed" for test in tests.required)


async def build(
    backend: Backend,
    repository: Path,
    out: Path,
    *,
    limit: int = 50,
    seconds: float = 60.0,
    say: Callable[[str], None] = lambda text: None,
) -> int:
    """Write `tasks.jsonl` (and `snapshots/`, for large repositories) into `out`; returns the number of tasks.

    Raises:
        ConfigError: it is no git repository, or none of its commits makes a task.
    """
    rows = []
    for commit in commits(repository, limit):
        made = await task_of(backend, repository, commit, seconds)
        title = commit.message.splitlines()[0] if commit.message else ""
        if isinstance(made, str):
            say(f"{commit.id[:10]} {title:.50}: no task, {made}")
            continue
        say(
            f"{commit.id[:10]} {title:.50}: {len(made.tests.fail_to_pass)} tests to pass, "
            f"{len(made.tests.pass_to_pass)} to go on passing"
        )
        rows.append(_stored(made, repository, commit, out))
    if not rows:
        raise ConfigError(f"{repository}: none of its last {limit} commits makes a task")
    _write(rows, out)
    return len(rows)


def _write(rows: list[RepositoryTask], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "tasks.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))


def _stored(task: RepositoryTask, repository: Path, commit: Commit, out: Path) -> RepositoryTask:
    if len(msgspec.json.encode(task.files)) <= INLINE:
        return task
    path = out / "snapshots" / f"{task.id}.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(git_archive(repository, commit.parent), mtime=0))
    return msgspec.structs.replace(task, files={}, snapshot=str(path.relative_to(out)))


def _spelled(content: bytes) -> Any:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
