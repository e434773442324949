"""Every backend that this machine must have, behind one door: `lab`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sandboxes.base import Backend, ExecResult, Limits, Sandbox, SandboxSpec, Shell
from sandboxes.registry import create

#: Name of the case -> backend and its options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bubblewrap": ("bubblewrap", {}),
}
#: What differs in how limits are held, and in nothing else: test_limits.py alone runs them, too.
LIMIT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bubblewrap-no-cgroups": ("bubblewrap", {"cgroups": False}),
}


class Called:
    """A sandbox or shell whose coroutines are run to their end when they are called."""

    def __init__(self, lab: Lab, target: Sandbox | Shell) -> None:
        self.lab, self.target = lab, target

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.target, name)

        def call(*arguments: Any, **options: Any) -> Any:
            done = attribute(*arguments, **options)
            return self.lab.run(done) if asyncio.iscoroutine(done) else done

        return call if callable(attribute) else attribute


class Lab:
    """A backend with an event loop of its own, for tests that are plain functions."""

    def __init__(self, runner: asyncio.Runner, backend: Backend) -> None:
        self.runner, self.backend = runner, backend

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(coroutine, 120))

    @contextmanager
    def open(self, limits: dict[str, Any] | None = None, **spec: Any) -> Iterator[Called]:
        sandbox = self.run(self.backend.open(SandboxSpec(limits=Limits(**(limits or {})), **spec)))
        try:
            yield Called(self, sandbox)
        finally:
            self.run(sandbox.close())

    def exec(self, *argv: str, limits: dict[str, Any] | None = None, **options: Any) -> ExecResult:
        """Run a program in a sandbox of its own."""
        with self.open(limits) as sandbox:
            result: ExecResult = sandbox.exec(argv, **options)
            return result

    def python(self, code: str, limits: dict[str, Any] | None = None, **options: Any) -> ExecResult:
        with self.open(limits) as sandbox:
            result: ExecResult = sandbox.run_python(code, **options)
            return result


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lab" in metafunc.fixturenames:
        limits = metafunc.module.__name__.endswith("test_limits")
        cases = [*CASES, *(LIMIT_CASES if limits else ())]
        metafunc.parametrize("lab", cases, indirect=True, scope="module")


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    name, options = (CASES | LIMIT_CASES)[request.param]
    with asyncio.Runner() as runner:

        async def made() -> Backend:
            return create(name, **options)

        backend = runner.run(made())
        yield Lab(runner, backend)
        runner.run(backend.close())
