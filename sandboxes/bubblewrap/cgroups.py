"""Control groups, versions 1 and 2: what the kernel counts and bounds for all processes of a sandbox
together.

Used where the machine lets us make groups: as root, or in a group that was delegated to the user. The keeper
makes them and is named in their names, so that groups whose keeper is dead can be told and removed.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "k2rl-"


def controllers() -> tuple[str, ...]:
    """What groups are made for. From Linux 5.14 on, RLIMIT_NPROC counts a user namespace's processes by
    itself, and another group would cost each sandbox more than all the rest of its start: joining one waits
    for every core."""
    return ("memory",) if counts_by_namespace() else ("memory", "pids")


def counts_by_namespace() -> bool:
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return version is not None and (int(version[1]), int(version[2])) >= (5, 14)


class NoCgroupsError(Exception):
    """This process may not make control groups; the message says why."""


@dataclass(frozen=True)
class Cgroup:
    """One sandbox's group: a folder (version 2) or one for each controller (version 1)."""

    version: int
    folders: dict[str, Path]

    def limit(self, memory_bytes: int, pids: int) -> None:
        memory = self.folders["memory"]
        if self.version == 1:
            (memory / "memory.limit_in_bytes").write_text(str(memory_bytes))
            swap = memory / "memory.memsw.limit_in_bytes"
        else:
            (memory / "memory.max").write_text(str(memory_bytes))
            (memory / "memory.oom.group").write_text("0")
            swap = memory / "memory.swap.max"
        if swap.exists():  # version 1 counts memory and swap together
            swap.write_text(str(memory_bytes if self.version == 1 else 0))
        if "pids" in self.folders:
            (self.folders["pids"] / "pids.max").write_text(str(pids))

    def join(self) -> None:
        """Put the calling process into the group."""
        for folder in set(self.folders.values()):
            (folder / "cgroup.procs").write_text("0")

    @property
    def events(self) -> Path:
        """The file that counts the processes which the kernel killed for memory; see `oom_kills`."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return self.folders["memory"] / name

    def kill(self) -> None:
        for folder in set(self.folders.values()):
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> bool:
        """Whether it is gone; it cannot go before its last process has."""
        for folder in set(self.folders.values()):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                return False
        return True


def oom_kills(events: Path) -> int:
    """How many processes of a group the kernel has killed for memory."""
    for line in events.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return 0


@dataclass(frozen=True)
class Hierarchy:
    """Where groups can be made."""

    version: int
    bases: dict[str, Path]

    def create(self, name: str) -> Cgroup:
        group = Cgroup(self.version, {key: base / name for key, base in self.bases.items()})
        for folder in set(group.folders.values()):
            folder.mkdir()
        return group

    def groups(self) -> Iterator[tuple[str, Cgroup]]:
        """Every group that a keeper has made, of this process or another."""
        names = {each.name for base in self.bases.values() for each in base.glob(f"{PREFIX}*")}
        for name in sorted(names):
            yield name, Cgroup(self.version, {key: base / name for key, base in self.bases.items()})

    def reap(self, patience: float = 5.0) -> int:
        """Remove the groups whose keeper is dead, and whatever still runs in them; how many there were."""
        stale = [group for name, group in self.groups() if not keeper_lives(name)]
        deadline = time.monotonic() + patience
        for group in stale:
            with suppress(FileNotFoundError):
                group.kill()
            while not group.remove() and time.monotonic() < deadline:
                time.sleep(0.01)
        return len(stale)


def group_name(number: int) -> str:
    """The name of this process's group of that number: a pid may come again, but not with its start time."""
    return f"{PREFIX}{os.getpid()}-{started(os.getpid())}-{number}"


def keeper_lives(name: str) -> bool:
    pid, start, _ = name.removeprefix(PREFIX).split("-")
    try:
        return started(int(pid)) == int(start)
    except (FileNotFoundError, ProcessLookupError):
        return False


def started(pid: int) -> int:
    """When a process started, in clock ticks after the boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def detect() -> Hierarchy:
    """Where this process can make groups that bound memory and processes.

    Raises:
        NoCgroupsError: nowhere.
    """
    mounts = _mounts()
    own = _own_groups()
    problems = []
    for candidate in _candidates(mounts, own):
        try:
            _try(candidate)
        except OSError as error:
            problems.append(f"{error.strerror or error} ({error.filename})" if error.filename else str(error))
            continue
        return candidate
    raise NoCgroupsError("; ".join(problems) or "no cgroup file system with the memory controller")


def _candidates(mounts: dict[str, tuple[Path, str]], own: dict[str, str]) -> Iterator[Hierarchy]:
    names = controllers()
    if all(name in mounts and name in own for name in names):
        yield Hierarchy(1, {name: _folder(mounts[name], own[name]) for name in names})
    if "" in mounts and "" in own:
        inner = _folder(mounts[""], own[""])
        yield Hierarchy(2, dict.fromkeys(names, inner))
        # A group with processes of its own can have no children that are bounded, the topmost excepted.
        if inner != mounts[""][0]:
            yield Hierarchy(2, dict.fromkeys(names, mounts[""][0]))


def _try(hierarchy: Hierarchy) -> None:
    """Make a group, limit it and remove it."""
    if hierarchy.version == 2:
        base = hierarchy.bases["memory"]
        enabled = (base / "cgroup.subtree_control").read_text().split()
        if missing := [f"+{name}" for name in hierarchy.bases if name not in enabled]:
            (base / "cgroup.subtree_control").write_text(" ".join(missing))
    group = hierarchy.create(group_name(0))
    try:
        group.limit(1 << 26, 10)
    finally:
        group.remove()


def _folder(mount: tuple[Path, str], path: str) -> Path:
    """A group's folder: its path is counted from the root of the hierarchy, the mount may show a part."""
    point, root = mount
    inside = path.removeprefix(root) if root != "/" else path
    return point / inside.strip("/")


def _mounts() -> dict[str, tuple[Path, str]]:
    """Controller (version 2: "") -> where it is mounted and which part of it."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(maxsplit=2)
        if kind == "cgroup2":
            found[""] = (Path(fields[4]), fields[3])
        elif kind == "cgroup":
            found.update({name: (Path(fields[4]), fields[3]) for name in options.split(",")})
    return found


def _own_groups() -> dict[str, str]:
    """Controller (version 2: "") -> the path of this process's group."""
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        found.update(dict.fromkeys(names.split(","), path))
    return found
