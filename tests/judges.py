"""Fixtures: judges on the real bubblewrap, one for the tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rubrics.code import CodeJudge
from sandboxes import registry

Run = Callable[[Any], Any]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One event loop for a module: backends belong to one."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def judge(loop: asyncio.Runner) -> Iterator[Callable[..., Any]]:
    """`judge(tests, code)` gives the outcome."""
    held: dict[str, CodeJudge] = {}

    async def build() -> None:
        held["judge"] = CodeJudge(parallel=2)

    loop.run(build())
    yield lambda tests, code: loop.run(held["judge"].judge(tests, code))
    loop.run(held["judge"].close())


@pytest.fixture(scope="module")
def backend(loop: asyncio.Runner) -> Iterator[Any]:
    """A bubblewrap backend of the module's loop."""

    async def build() -> Any:
        return registry.create("bubblewrap")

    made = loop.run(build())
    yield made
    loop.run(made.close())
