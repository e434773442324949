"""Real runs: real Ray, real vLLM, a tiny random model."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

DEADLINE_S = 240.0
CENSUS_INTERVAL_S = 0.2


class Command:
    """A `k2rl` command and every process that was ever seen below it, found also after its parents died."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "k2rl.cli", *arguments],
            cwd=cwd,
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

    def named(self, name: str) -> psutil.Process:
        """The one descendant whose command line or name has `name` in it."""
        self.look()
        found = [p for p in self.descendants() if name in p.name() or name in " ".join(p.cmdline())]
        assert len(found) == 1, f"{len(found)} processes named {name}: {found}"
        return found[0]


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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of `experiment=tiny`."""
    cwd = tmp_path_factory.mktemp("tiny")
    command = Command("train", "experiment=tiny", f"hydra.run.dir={cwd / 'run'}", cwd=cwd)
    code, out, err = command.finish()
    assert code == 0, f"{out}\n{err}"
    wait_for(lambda: not command.descendants(), "all processes of the run end", 20)
    return cwd / "run"
