"""Process hygiene: nobody outlives the process that owns it, output goes where it can be found."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

#: Of the message queues between vLLM's processes, and of its tensor-parallel ranks.
_SEGMENT = re.compile(r"(/dev/shm/(?:psm_|vllm_dist_)\S+)")

OWNER_PID = "K2RL_OWNER_PID"
"""Environment variable: the process whose end must end its vLLM engine core and workers."""


def follow_owner_in_death() -> None:
    """Kill this process's parent and itself when the process named by `OWNER_PID` ends.

    Called in a vLLM worker. vLLM's worker follows its engine core, but the engine core would outlive
    a killed front end and keep its memory; so the worker, which we own, takes the core with it.
    """
    owner = os.environ.get(OWNER_PID)
    if owner is None:
        return
    handle = os.pidfd_open(int(owner))
    threading.Thread(target=_wait_and_kill, args=(handle, os.getppid()), daemon=True).start()


def _wait_and_kill(owner_handle: int, parent: int) -> None:
    select.select([owner_handle], [], [])
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def shared_memory_of(*pids: int) -> set[Path]:
    """The shared memory by which vLLM's processes talk: files that stay if these processes are killed."""
    found: set[Path] = set()
    for pid in pids:
        with suppress(OSError):
            found.update(map(Path, _SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text())))
    return found


def remove(files: Iterable[Path]) -> None:
    """Remove those that are there yet."""
    for file in files:
        file.unlink(missing_ok=True)


def end_at_once_on(*signals: signal.Signals) -> None:
    """Let the next of these signals kill all processes below this one, and end it, whatever it is doing.

    Left to themselves, Ray's agents would look for their dead cluster for a minute. A thread waits for the
    signal: a handler of Python's would have to wait for the main thread.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in signals:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(write)
    threading.Thread(target=_end_on_byte, args=(read,), daemon=True).start()


def _end_on_byte(descriptor: int) -> None:
    (number,) = os.read(descriptor, 1)
    processes = psutil.Process().children(recursive=True)
    segments = shared_memory_of(*(process.pid for process in processes))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    remove(segments)
    os._exit(128 + number)


def redirect_output(path: Path) -> None:
    """Send this process's stdout and stderr, and those of the children it will have, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def last_lines(path: Path, count: int = 12) -> str:
    """The end of a log file; empty if there is none."""
    if not path.exists():
        return ""
    with path.open(errors="replace") as file:
        return "".join(deque((line for line in file if line.strip()), maxlen=count)).rstrip()
