"""Python programs of ours, packed as one text that runs in a sandbox, and the sandboxes that they run in."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib.resources import files
from typing import Any

from sandboxes.base import Backend, ExecResult, Limits, Sandbox, SandboxSpec
from sandboxes.errors import SandboxClosedError

WALL_FACTOR = 4.0
"""Seconds of real time for a second of CPU time: other work on the machine must not turn right into wrong."""

_PRELOAD = (
    *(
        "bisect",
        "collections",
        "copy",
        "functools",
        "heapq",
        "itertools",
        "json",
        "math",
        "operator",
        "random",
    ),
    *("re", "resource", "string", "typing", "unittest"),
)

_START = """
import json, resource, sys, types
def _limit(seconds):
    soft = max(1, int(seconds + 0.999))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    hard = soft + 1 if hard == resource.RLIM_INFINITY else min(hard, soft + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard), hard))
"""


@cache
def module_source(name: str) -> str:
    """The text of a module of this package."""
    return (files("rubrics.code") / f"{name}.py").read_text(encoding="utf-8")


def packed(main: str, request: dict[str, Any], seconds: float) -> str:
    """A program that runs `main(request)` of one of the modules `candidate` and `tester`, with all they
    import.

    The request is part of the text: a candidate that reads stdin finds nothing there.
    """
    modules = ["values", "candidate"] + (["tester"] if main == "tester" else [])
    parts = [
        _START,
        f"_limit({seconds!r})",
        'for _name in ("rubrics", "rubrics.code"):\n    sys.modules[_name] = types.ModuleType(_name)',
    ]
    for name in modules:
        full = f"rubrics.code.{name}"
        parts.append(f"_module = sys.modules[{full!r}] = types.ModuleType({full!r})")
        parts.append(f"exec(compile({module_source(name)!r}, {f'{name}.py'!r}, 'exec'), _module.__dict__)")
    parts.append(f"_module.main(json.loads({json.dumps(request)!r}))")
    return "\n".join(parts)


def limited(code: str, seconds: float) -> str:
    """A program of the candidate's as it is, with a limit of CPU time."""
    return (
        f"{_START}\n_limit({seconds!r})\n"
        f"exec(compile({code!r}, 'solution.py', 'exec', dont_inherit=True), {{'__name__': '__main__'}})"
    )


class Runner:
    """A few open sandboxes in which nothing survives a run, for Python programs that take turns in them."""

    def __init__(self, backend: Backend, parallel: int, limits: Limits) -> None:
        self._backend = backend
        self._spec = SandboxSpec(limits=limits, ephemeral=True, preload=_PRELOAD)
        self._free: asyncio.Queue[Sandbox | None] = asyncio.Queue()
        for _ in range(parallel):
            self._free.put_nowait(None)

    async def run(self, program: str, *, seconds: float, stdin: bytes = b"") -> ExecResult:
        """Run a program; one whose sandbox died is run once more in a new one.

        Raises:
            SandboxError: the sandbox failed, twice.
        """
        try:
            return await self._run(program, seconds, stdin)
        except SandboxClosedError:
            return await self._run(program, seconds, stdin)

    async def _run(self, program: str, seconds: float, stdin: bytes) -> ExecResult:
        async with self._sandbox() as sandbox:
            return await sandbox.run_python(program, stdin=stdin, timeout=WALL_FACTOR * seconds + 2)

    @asynccontextmanager
    async def _sandbox(self) -> AsyncIterator[Sandbox]:
        sandbox = await self._free.get()
        try:
            if sandbox is None:
                sandbox = await self._backend.open(self._spec)
            yield sandbox
        except BaseException:
            # Whatever state it is in: the next turn gets a new one.
            broken, sandbox = sandbox, None
            if broken is not None:
                await asyncio.shield(broken.close())
            raise
        finally:
            self._free.put_nowait(sandbox)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
