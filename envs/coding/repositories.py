"""Repository tasks as records, their repositories, and files of them: our own rows and SWE-bench's."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tarfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from envs.coding.formats import read_rows
from envs.coding.patches import PatchError, apply_patch
from k2rl.errors import ConfigError
from k2rl.types import prepare
from rubrics.code.repository import RepositoryTests

MOST_BYTES = 2**29
GIT_S = 120


class RepositoryTask(msgspec.Struct, frozen=True):
    """An issue in a repository, and the hidden tests that tell whether it is solved.

    The repository is in `files` (path -> text, or {"base64": …}), or `snapshot` is a tar file or a folder.
    """

    id: str
    issue: str
    tests: RepositoryTests
    files: dict[str, Any] = {}
    snapshot: str = ""
    #: The solution: path -> text, or None for a file that goes.
    solution: dict[str, str | None] = {}
    #: Where it runs: the backend's default, or an image with what the repository needs.
    image: str | None = None
    tags: tuple[str, ...] = ()
    released: str | None = None


def load_tasks(source: str | None, format: str = "auto") -> list[RepositoryTask]:
    """Our own tasks, or those of a file.

    Raises:
        ConfigError: one line: no such file or format, a row that is wrong, a repository that is missing.
    """
    if source is None:
        text = (files("envs.coding") / "data" / "swe.jsonl").read_bytes()
        return [msgspec.json.decode(line, type=RepositoryTask) for line in text.splitlines() if line.strip()]
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(f"tasks_file={source!r}: there is no such file")
    return list(_load(path.resolve(), format, path.stat().st_mtime_ns))


@lru_cache(maxsize=16)
def _load(path: Path, format: str, version: int) -> tuple[RepositoryTask, ...]:
    rows = read_rows(path)
    if format == "auto":
        format = "swebench" if "FAIL_TO_PASS" in rows[0] else "own"
    readers = {"own": _own, "swebench": swebench}
    if format not in readers:
        raise ConfigError(f"format={format} is not one of: {', '.join(readers)}")
    tasks = []
    for number, row in enumerate(rows, start=1):
        try:
            tasks.append(readers[format](row, path.parent))
        except KeyError as error:
            raise ConfigError(f"{path}, row {number}: no {error} in a row of format {format}") from error
        except (PatchError, TypeError, ValueError, msgspec.ValidationError) as error:
            raise ConfigError(f"{path}, row {number}: not of format {format}: {error}") from error
    return tuple(tasks)


def _own(row: dict[str, Any], folder: Path) -> RepositoryTask:
    task = msgspec.convert(row, RepositoryTask)
    if task.snapshot:
        return msgspec.structs.replace(task, snapshot=str(folder / task.snapshot))
    return task


def swebench(row: dict[str, Any], folder: Path) -> RepositoryTask:
    """A SWE-bench row. Its repository is beside the file: `repos/<owner>__<name>`, a git clone, or
    `snapshots/<instance_id>.tar.gz` (or a folder of that name).
    """
    name = row["instance_id"]
    clone = folder / "repos" / str(row["repo"]).replace("/", "__")
    snapshots = [folder / "snapshots" / f"{name}{suffix}" for suffix in (".tar.gz", ".tar", "")]
    found = next((path for path in snapshots if path.exists()), None)
    if found is None and not clone.is_dir():
        raise ValueError(f"neither {clone} nor {snapshots[0]} is there")
    snapshot = str(found) if found is not None else f"{clone}@{row['base_commit']}"
    repository = read_snapshot(snapshot)
    hidden = apply_patch(repository, row["test_patch"])
    solution = apply_patch(repository, row["patch"])
    tests = RepositoryTests(
        {path: content.decode("utf-8", "replace") for path, content in hidden.items() if content is not None},
        _ids(row["FAIL_TO_PASS"]),
        _ids(row.get("PASS_TO_PASS") or "[]"),
        # Found out for our own tasks; here nobody has tried it with the solution.
        checks_equality=False,
        seconds=600.0,
    )
    return RepositoryTask(
        name,
        row["problem_statement"],
        tests,
        snapshot=snapshot,
        solution={
            path: None if text is None else text.decode("utf-8", "replace") for path, text in solution.items()
        },
        image=row.get("image"),
        tags=(str(row["repo"]),),
        released=str(row["created_at"])[:10] if row.get("created_at") else None,
    )


def _ids(listed: Any) -> tuple[str, ...]:
    ids = json.loads(listed) if isinstance(listed, str) else listed
    return tuple(str(id) for id in ids)


def repository_of(task: RepositoryTask) -> dict[str, bytes]:
    """The files of a task's repository.

    Raises:
        ConfigError: its snapshot is missing or damaged.
    """
    if task.snapshot:
        return dict(read_snapshot(task.snapshot))
    return {path: _content(text) for path, text in task.files.items()}


def _content(text: Any) -> bytes:
    return text.encode() if isinstance(text, str) else base64.b64decode(text["base64"])


@lru_cache(maxsize=8)
def read_snapshot(source: str) -> dict[str, bytes]:
    """The regular files of a folder, a tar file, or `CLONE@COMMIT` of a git clone.

    Raises:
        ConfigError: it is missing, damaged or larger than half a gigabyte.
    """
    clone, at, commit = source.rpartition("@")
    if at and Path(clone).is_dir():
        return _of_tar(source, git_archive(Path(clone), commit))
    path = Path(source)
    if path.is_dir():
        inside = (file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
        return {str(file.relative_to(path)): file.read_bytes() for file in inside if ".git" not in file.parts}
    try:
        return _of_tar(source, path.read_bytes())
    except OSError as error:
        raise ConfigError(f"snapshot {source}: {error.strerror}") from error


def _of_tar(source: str, content: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                total += member.size
                if total > MOST_BYTES:
                    raise ConfigError(f"snapshot {source} is larger than {MOST_BYTES // 2**20} MiB")
                stream = archive.extractfile(member)
                assert stream is not None
                found[member.name.removeprefix("./")] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(f"snapshot {source} is no tar file: {error}") from error
    return found


def git(repository: Path, *arguments: str) -> bytes:
    """What git says.

    Raises:
        ConfigError: one line of its error.
    """
    command = ["git", "-c", "core.hooksPath=/dev/null", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"git {arguments[0]} in {repository}: {error}") from error
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ConfigError(f"git {arguments[0]} in {repository}: {said[-1] if said else done.returncode}")
    return done.stdout


def git_archive(repository: Path, commit: str) -> bytes:
    """A commit's files as a tar file."""
    return git(repository, "archive", "--format=tar", commit)


prepare(RepositoryTask)
