"""The processes of a run on this host, and what the system says of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

from k2rl.diagnosis.activity import Entry, read

STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
#: Processes that say nothing of themselves and yet are worth a line, by what is in their command lines.
_OTHERS = {
    "from multiprocessing.forkserver": "fork server",
    "/raylet/raylet ": "Ray's raylet",
    "/gcs/gcs_server ": "Ray's head",
}


class RunProcess(msgspec.Struct, frozen=True):
    """A process of a run."""

    pid: int
    name: str
    #: As psutil calls it.
    state: str
    #: All processes above it, the nearest first.
    above: tuple[int, ...]
    entries: tuple[Entry, ...]
    is_python: bool = True

    @property
    def stopped(self) -> bool:
        return self.state in STOPPED

    @property
    def entry(self) -> Entry | None:
        """The part of it that has been in its phase the longest."""
        return min((e for e in self.entries if e.phase), key=lambda entry: entry.since, default=None)


def of_run(logs: Path) -> list[RunProcess]:
    """The processes of the run with this logs folder that this user may look at, oldest first."""
    said = {pid: read(pid) for pid in psutil.pids()}
    own = {pid: known for pid, known in said.items() if known and known[0].logs == str(logs.resolve())}
    found = {}
    for pid, (identity, entries) in own.items():
        found[pid] = _look(pid, identity.name, entries)
        for child in _children(pid):
            if child not in own and child not in found and (name := _known(child)):
                found[child] = _look(child, name, (), is_python=name == "fork server")
    return sorted((process for process in found.values() if process is not None), key=lambda p: p.pid)


def in_a_word(pid: int) -> str:
    """What a process of a run on this host is doing now, to end a sentence with; at once."""
    known = read(pid)
    found = _look(pid, known[0].name, known[1]) if known else None
    if found is None:
        return ""
    if found.stopped:
        return f"; {found.name} is stopped, by a signal or a debugger"
    phase = f", {found.entry.phase}" if found.entry else ""
    return f"; {found.name} is {found.state}{phase}"


def _look(pid: int, name: str, entries: Iterable[Entry], is_python: bool = True) -> RunProcess | None:
    try:
        process = psutil.Process(pid)
        above = tuple(parent.pid for parent in process.parents())
        return RunProcess(pid, name, process.status(), above, tuple(entries), is_python)
    except psutil.Error:  # it has ended since
        return None


def _children(pid: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _known(pid: int) -> str | None:
    try:
        line = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return None
    return next((name for part, name in _OTHERS.items() if part in line), None)
