"""Real runs: real Ray, real vLLM, a tiny random model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

MARK = "K2RL_TEST_MARK"
DEADLINE_S = 180.0


class Command:
    """A `k2rl` command whose whole process tree can be found, also after its parents have died."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "k2rl.cli", *arguments],
            cwd=cwd,
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, deadline_s: float = DEADLINE_S) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out, err

    def descendants(self) -> list[psutil.Process]:
        """Every living process that inherited this command's mark."""
        return [process for process in psutil.process_iter() if self._is_marked(process)]

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def named(self, name: str) -> psutil.Process:
        """The one descendant whose command line or name has `name` in it."""
        found = [p for p in self.descendants() if name in p.name() or name in " ".join(p.cmdline())]
        assert len(found) == 1, f"{len(found)} processes named {name}: {found}"
        return found[0]


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
