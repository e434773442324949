"""Real runs: real Ray, real vLLM, a tiny random model."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.installation import environment, everything, install

DEADLINE_S = 480.0
CENSUS_INTERVAL_S = 0.2
TITLE_S = 20.0


class Command:
    """A `k2rl` command and every process that was ever seen below it, found also after its parents died."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        program: Sequence[str | Path] = (sys.executable, "-m", "k2rl.cli"),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [*program, *arguments],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._seen: set[psutil.Process] = {psutil.Process(self.process.pid)}
        threading.Thread(target=self._take_census, daemon=True).start()

    def _take_census(self) -> None:
        while self.process.poll() is None:
            self.look()
            time.sleep(CENSUS_INTERVAL_S)

    def look(self) -> None:
        """Note the processes that are there now."""
        with contextlib.suppress(psutil.Error):
            self._seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def finish(self, deadline_s: float = DEADLINE_S) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out, err

    def descendants(self) -> list[psutil.Process]:
        """Those that are still alive."""
        return [process for process in set(self._seen) if _is_alive(process)]

    def all_named(self, name: str) -> list[psutil.Process]:
        """The descendants whose command line or name has `name` in it."""
        self.look()
        return [process for process in self.descendants() if _is_named(process, name)]

    def named(self, name: str) -> psutil.Process:
        """The one that there is, or will be soon: a title can be read a moment after its process is there."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: len(self.all_named(name)) == 1, f"one process named {name}", TITLE_S)
        found = self.all_named(name)
        assert len(found) == 1, f"{len(found)} processes named {name} of {self.descendants()}: {found}"
        return found[0]


def _is_named(process: psutil.Process, name: str) -> bool:
    """The kernel keeps 15 bytes of a process's name."""
    try:
        return name[:15] in process.name() or name in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll a condition until it holds; fails the test at the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.1)


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start commands; whatever is left of them at the end of the test is killed."""
    commands: list[Command] = []

    def start_command(*arguments: str, cwd: Path) -> Command:
        commands.append(Command(*arguments, cwd=cwd))
        return commands[-1]

    yield start_command
    for command in commands:
        for process in command.descendants():
            process.kill()
        command.process.wait()


STEPS = 4
"""Of the tiny run."""


@pytest.fixture(scope="session")
def tiny_run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `experiment=tiny`, of an installed wheel, in an empty folder."""
    scratch = tmp_path_factory.mktemp("tiny")
    binaries, cwd = install(wheel, scratch / "venv", everything()), scratch / "elsewhere"
    cwd.mkdir()
    _require_the_wheel(binaries, cwd)
    arguments = ("train", "experiment=tiny", "seed=1", f"train.steps={STEPS}")
    command = Command(*arguments, cwd=cwd, program=[binaries / "k2rl"], env=environment())
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    wait_for(lambda: not command.descendants(), "all processes of the run end", 90)
    (run,) = (cwd / "outputs" / "tiny").iterdir()
    return run


def _require_the_wheel(binaries: Path, cwd: Path) -> None:
    """What is imported there must be what was installed, not this checkout."""
    code = "import sys, k2rl, envs, rubrics, sandboxes\nprint(*sys.path)"
    code += "\nprint(*{m.__file__ for m in (k2rl, envs, rubrics, sandboxes)}, sep='\\n')"
    path, *files = subprocess.run(
        [binaries / "python", "-c", code],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert str(ROOT) not in path.split()
    for file in files:
        assert Path(file).is_relative_to(binaries.parent), file
