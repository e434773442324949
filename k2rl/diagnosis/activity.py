"""What this process is doing, written where others can read it even while it stands still.

Every process of a run keeps a small file in memory that has no name and lives as long as it does. Others of
the same user read it under `/proc/PID/fd`: nobody has to answer, no folder fills up, nothing is left behind.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

ACTIVITY_FILE = "k2rl-activity"
STACKS_FILE = "k2rl-stacks"
"""Where `faulthandler` writes the stacks of all threads at `STACKS_SIGNAL`."""

STACKS_SIGNAL = signal.SIGUSR1
#: The file: who this is, then a slot for each part.
IDENTITY_BYTES, SLOT_BYTES = 8192, 512
_MAX_TEXT = 150

#: For the processes that one of a run starts: the run's logs folder, and who starts them.
_LOGS_VARIABLE, _OWNER_VARIABLE = "K2RL_LOGS", "K2RL_OWNER"


class Identity(msgspec.Struct, frozen=True):
    """The beginning of a process's file."""

    #: The logs folder of its run.
    logs: str
    name: str


class Entry(msgspec.Struct, frozen=True):
    """A slot for each part of a process that does things by itself."""

    part: str
    #: What it is doing, the innermost last; empty: it waits to be asked.
    phase: str
    #: Since when, on the monotonic clock, which all processes of a host share.
    since: float
    #: The last it had to say.
    message: str
    #: Whose phase it is: `threading.get_ident()`.
    thread: int


class _Process:
    """This process's file; none until it is known to belong to a run."""

    def __init__(self) -> None:
        self.file: int | None = None
        self.stacks: int | None = None
        self.parts: list[Part] = []
        self.lock = threading.Lock()

    def write(self, record: msgspec.Struct, start: int, room: int) -> None:
        if self.file is not None:
            # A full disk: what cannot be told must not end what is being done.
            with suppress(OSError):
                os.pwrite(self.file, msgspec.json.encode(record)[:room].ljust(room), start)


_process = _Process()


def begin(logs: Path, name: str) -> None:
    """This process belongs to a run, under this name; those that it starts will find out by `inherit`."""
    with _process.lock:
        if _process.file is None:
            _process.file = os.memfd_create(ACTIVITY_FILE)
            _process.stacks = os.memfd_create(STACKS_FILE)
            faulthandler.register(STACKS_SIGNAL, file=_process.stacks, all_threads=True)
        _process.write(Identity(str(logs.resolve()), name[:_MAX_TEXT]), 0, IDENTITY_BYTES)
    os.environ[_LOGS_VARIABLE] = str(logs.resolve())
    # Of what several of them start in a row, all are the first one's.
    if not name.endswith(f" of {os.environ.get(_OWNER_VARIABLE)}"):
        os.environ[_OWNER_VARIABLE] = name
    for part in _process.parts:
        part.write()


def inherit(name: str) -> None:
    """As `begin`, in a process that one of a run has started; nothing happens elsewhere."""
    logs = os.environ.get(_LOGS_VARIABLE)
    if logs:
        begin(Path(logs), f"{name} of {os.environ[_OWNER_VARIABLE]}")


class Part:
    """Something in this process that does one thing after the other: a thread, an engine's front end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: dict[object, tuple[str, float, int]] = {}
        self._message = ""
        self._lock = threading.Lock()
        self._start = IDENTITY_BYTES + len(_process.parts) * SLOT_BYTES
        _process.parts.append(self)

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Around what takes time. A part may do several things at once; within a thread they are nested."""
        key = object()
        with self._lock:
            self._open[key] = phase, time.monotonic(), threading.get_ident()
            self._write()
        try:
            yield
        finally:
            with self._lock:
                self._open.pop(key, None)  # a child that was forked meanwhile has forgotten it
                self._write()

    def note(self, message: str) -> None:
        """The last thing there was to say."""
        with self._lock:
            self._message = message
            self._write()

    def write(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        if _process.file is None:
            return
        last, since, thread = "", time.monotonic(), threading.get_ident()
        if self._open:
            last = next(reversed(self._open.values()))[0]
            # Of several that do the same, the one that does so the longest.
            _, since, thread = next(entry for entry in self._open.values() if entry[0] == last)
        text = ": ".join(dict.fromkeys(phase for phase, _, _ in self._open.values()))
        entry = Entry(self._name, _short(text), since, _short(self._message), thread)
        _process.write(entry, self._start, SLOT_BYTES)

    def reset(self) -> None:
        """In a forked child nothing is under way."""
        self._open, self._message, self._lock = {}, "", threading.Lock()


def _short(text: str) -> str:
    """So that every record fits its slot, in ASCII."""
    plain = text.encode("ascii", "replace").decode().replace('"', "'").replace("\\", "/")
    return plain if len(plain) <= _MAX_TEXT else f"{plain[: _MAX_TEXT - 3]}..."


def _after_fork() -> None:
    """The parent's file stays the parent's."""
    if _process.file is not None and _process.stacks is not None:
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(_process.file)
        os.close(_process.stacks)
    _process.file = _process.stacks = None
    _process.lock = threading.Lock()
    for part in _process.parts:
        part.reset()


os.register_at_fork(after_in_child=_after_fork)

DRIVER = Part("driver")
TRAINER = Part("trainer")
FRONT_END = Part("vLLM's front end")
VLLM_WORKER = Part("vLLM")
PUSH = Part("push")


def read(pid: int) -> tuple[Identity, list[Entry]] | None:
    """What a process of this host says it does; None if it is none of a run's, or may not be looked at."""
    data = read_file(pid, ACTIVITY_FILE)
    if not data:
        return None
    slots = [data[at : at + SLOT_BYTES].strip(b" \0") for at in range(IDENTITY_BYTES, len(data), SLOT_BYTES)]
    try:
        identity = msgspec.json.decode(data[:IDENTITY_BYTES], type=Identity)
        entries = [msgspec.json.decode(slot, type=Entry) for slot in slots if slot]
    except msgspec.DecodeError:  # read in the middle of a write
        return None
    return identity, [entry for entry in entries if entry.phase or entry.message]


def read_file(pid: int, name: str) -> bytes | None:
    """The contents of a process's nameless file; None if it has none."""
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if str(descriptor.readlink()).startswith(f"/memfd:{name} "):
                return descriptor.read_bytes()
    except OSError:  # it has ended, or is another user's
        return None
    return None
