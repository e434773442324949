"""Python stacks of another process, which need not answer for it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import msgspec

from k2rl.diagnosis.activity import STACKS_FILE, STACKS_SIGNAL, read_file

PY_SPY_S = 6.0
ANSWER_S = 2.0
"""For a process to write its own stacks, and how often to look for them."""
_LOOK_S = 0.05

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


class Thread(msgspec.Struct, frozen=True):
    """A thread's stack, the innermost frame first: `path:line in function`."""

    ident: int
    name: str
    frames: tuple[str, ...]


def stacks_of(pid: int, stopped: bool = False) -> tuple[list[Thread], str]:
    """The threads of a Python process, and why there are none.

    py-spy reads them from its memory, without stopping it and also where it stands still; it needs the right
    to (root, or the same user where the system lets users look into their processes). Where it has none, a
    process of a run that still takes signals writes them itself.
    """
    threads, why = _by_py_spy(pid)
    if threads or stopped:
        return threads, why
    answered = _by_itself(pid)
    return answered, "" if answered else f"{why}; nor did it write its stacks itself within {ANSWER_S:g} s"


def _by_py_spy(pid: int) -> tuple[list[Thread], str]:
    program = _py_spy()
    if program is None:
        return [], "py-spy is not installed"
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--json", "--pid", str(pid)],
            capture_output=True,
            timeout=PY_SPY_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"py-spy took more than {PY_SPY_S:g} s"
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return [], f"py-spy: {lines[0] if lines else f'exit code {done.returncode}'}"
    found: list[dict[str, Any]] = msgspec.json.decode(done.stdout)
    return [
        Thread(
            thread["thread_id"] & 2**64 - 1,
            thread["thread_name"] or "",
            tuple(f"{_place(f['filename'])}:{f['line']} in {f['name']}" for f in thread["frames"]),
        )
        for thread in found
    ], ""


@functools.cache
def _py_spy() -> str | None:
    """Its program, where the package is installed; that folder need not be on the path."""
    try:
        files = distribution("py-spy").files or []
    except PackageNotFoundError:
        return shutil.which("py-spy")
    return next((str(file.locate()) for file in files if file.name == "py-spy"), None)


def _by_itself(pid: int) -> list[Thread]:
    """Ask for what `activity.begin` has prepared."""
    before = read_file(pid, STACKS_FILE)
    if before is None:  # the signal would end it
        return []
    try:
        os.kill(pid, STACKS_SIGNAL)
    except OSError:
        return []
    return parse_faulthandler(_written(lambda: read_file(pid, STACKS_FILE) or b"", len(before)))


def _written(look: Callable[[], bytes], start: int) -> str:
    """What was added, once it no longer grows."""
    end, seen = time.monotonic() + ANSWER_S, start
    while time.monotonic() < end:
        time.sleep(_LOOK_S)
        data = look()
        if len(data) == seen > start:
            return data[start:].decode(errors="replace")
        seen = len(data)
    return ""


def innermost(thread: threading.Thread, number: int) -> str:
    """Where a thread of this process stands: its innermost frames."""
    frame = sys._current_frames().get(thread.ident or 0)
    frames: list[str] = []
    while frame is not None and len(frames) < number:
        frames.append(f"{_place(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return ", called from ".join(frames) or "its end"


def parse_faulthandler(text: str) -> list[Thread]:
    """The threads in what `faulthandler` wrote; it knows no names."""
    threads: list[Thread] = []
    for line in text.splitlines():
        if head := _THREAD.match(line):
            threads.append(Thread(int(head[1], 16), "", ()))
        elif (frame := _FRAME.match(line)) and threads:
            last = threads[-1]
            place = f"{_place(frame[1])}:{frame[2]} in {frame[3]}"
            threads[-1] = Thread(last.ident, last.name, (*last.frames, place))
    return threads


def _place(path: str) -> str:
    """A file from its package on, or from its last three folders."""
    tail = path.rpartition("/site-packages/")[2]
    return tail if tail != path else "/".join(Path(path).parts[-3:])
