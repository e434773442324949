"""Coding problems as records, and sets of them: our own, or a file in a format that others publish."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from datetime import date
from functools import lru_cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from k2rl.errors import ConfigError
from k2rl.types import Split, prepare
from rubrics.code import CodeTests

T = TypeVar("T")

EVAL_ONE_IN = 3
"""One problem in so many belongs to the eval split: a function of its id and text alone."""


class CodeProblem(msgspec.Struct, frozen=True):
    """What to write, and what it is judged by."""

    id: str
    question: str
    tests: CodeTests
    #: Code that the answer goes on from, or must fit: a signature with its docstring, a class.
    starter: str = ""
    #: A whole program that passes.
    solution: str | None = None
    #: Asserts that the policy may see.
    visible: str = ""
    tags: tuple[str, ...] = ()
    #: ISO date on which the problem became public: what a model cannot have seen before.
    released: str | None = None

    @property
    def split(self) -> Split:
        digest = hashlib.sha256(f"{self.id}\n{self.question}".encode()).digest()
        return "eval" if int.from_bytes(digest[:4], "big") % EVAL_ONE_IN == 0 else "train"


def own_problems(name: str) -> list[CodeProblem]:
    """A set that is shipped with this package: `functions`, `contests` or `bugs`."""
    text = (files("envs.coding") / "data" / f"{name}.jsonl").read_bytes()
    return [msgspec.json.decode(line, type=CodeProblem) for line in text.splitlines() if line.strip()]


def load_problems(source: str, format: str) -> list[CodeProblem]:
    """The problems of one of our own sets, of an installed package (`humaneval`), or of a file; read once.

    Raises:
        ConfigError: one line: no such set, file, format or row.
    """
    if source in (*OWN, "humaneval"):
        return list(_load(source, format, 0))
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"problems={source!r} is neither a file nor one of: {', '.join((*OWN, 'humaneval'))}"
        )
    return list(_load(str(path), format, path.stat().st_mtime_ns))


@lru_cache(maxsize=32)
def _load(source: str, format: str, version: int) -> tuple[CodeProblem, ...]:
    from envs.coding import formats

    if source in OWN:
        return tuple(own_problems(source))
    if source == "humaneval":
        return tuple(formats.installed_humaneval())
    return tuple(formats.read_problems(Path(source), format))


def released_between(problems: list[CodeProblem], since: str | None, until: str | None) -> list[CodeProblem]:
    """The problems that became public from `since` on and before `until` (ISO dates); all without either.

    Raises:
        ConfigError: a date is none, or there is no problem left.
    """
    if since is None and until is None:
        return problems
    low, high = _date("since", since, date.min), _date("until", until, date.max)
    chosen = [
        problem
        for problem in problems
        if problem.released is not None and low <= date.fromisoformat(problem.released) < high
    ]
    if not chosen:
        dates = sorted(problem.released for problem in problems if problem.released)
        known = f"; theirs are {dates[0]} to {dates[-1]}" if dates else "; none has a date"
        raise ConfigError(f"no problem was released between {low} and {high}{known}")
    return chosen


def _date(name: str, text: str | None, default: date) -> date:
    if text is None:
        return default
    try:
        return date.fromisoformat(text)
    except (ValueError, TypeError):
        raise ConfigError(f"{name}={text!r} is not a date like 2024-08-01") from None


def shuffled(items: Sequence[T], split: Split, seed: int) -> Iterator[tuple[int, T]]:
    """The items in an order that split and seed decide, again and again, each with its place from 0 on."""
    rng, places = random.Random(f"{split} {seed}"), count()
    while True:
        for item in rng.sample(items, len(items)):
            yield next(places), item


def as_data(problem: CodeProblem) -> dict[str, Any]:
    """A problem as `Task.data`."""
    data: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(problem))
    return data


def of_data(data: dict[str, Any]) -> CodeProblem:
    """The problem of a `Task.data`."""
    return msgspec.convert(data, CodeProblem)


OWN = ("functions", "contests", "bugs")


prepare(CodeProblem)
