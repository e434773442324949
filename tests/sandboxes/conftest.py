"""Every backend that this machine must have, behind one door: `lab`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from sandboxes.base import Backend, ExecResult, Limits, Sandbox, SandboxSpec, Shell
from sandboxes.registry import create
from sandboxes.wire import TOKEN_VARIABLE

TOKEN = "for-these-tests-alone"

#: Name of the case -> backend and its options.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bubblewrap": ("bubblewrap", {}),
    "docker": ("docker", {}),
    "remote-bubblewrap": ("remote", {"served": "bubblewrap"}),
    "remote-docker": ("remote", {"served": "docker"}),
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
        marked = [pytest.param(name, marks=marks(name)) for name in cases]
        metafunc.parametrize("lab", marked, indirect=True, scope="module")


def marks(case: str) -> list[pytest.MarkDecorator]:
    """What takes long for what it adds is left to `make test-slow`; without docker some cannot run."""
    docker = [pytest.mark.docker] if "docker" in case else []
    return [*docker, *([pytest.mark.slow] if "docker" in case or "remote" in case else [])]


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    name, options = (CASES | LIMIT_CASES)[request.param]
    with asyncio.Runner() as runner, ExitStack() as stack:
        if "served" in options:
            server = stack.enter_context(served(options["served"], "--lend-path", "/usr/share/doc"))
            options = {"urls": server.url, "token": TOKEN}

        async def made() -> Backend:
            return create(name, **options)

        backend = runner.run(made())
        yield Lab(runner, backend)
        runner.run(backend.close())


class Server:
    """`k2rl sandbox serve` as a process."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.port = int(url.rpartition(":")[2])

    async def stop(self) -> None:
        """End it as a service manager does, and wait."""
        self.process.terminate()
        assert await asyncio.to_thread(self.process.wait, 60) == 0


@contextmanager
def served(
    backend: str, *options: str, port: int = 0, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    command = [sys.executable, "-m", "k2rl.cli", "sandbox", "serve", "--backend", backend, *options]
    environment = environment or {**os.environ, TOKEN_VARIABLE: TOKEN}
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith(f"{backend} sandboxes at http://"), said
            yield Server(process, said.split()[-1])
        finally:
            process.terminate()
            assert process.wait(60) in (0, -signal.SIGKILL)
