"""Why nothing happens: what every part of a run is doing, and where the stuck one stands."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import psutil

from k2rl.diagnosis.processes import RunProcess, of_run
from k2rl.diagnosis.stacks import Thread, stacks_of

FRAMES_SHOWN = 6
_AT_ONCE = 8
WAITING = "waiting for"
"""In a phase in which somebody else is to blame."""


class Diagnosis(msgspec.Struct, frozen=True):
    """What was found on one host."""

    #: A line for each part, and the innermost frames of the stuck one.
    essence: str
    #: The same with all Python stacks.
    whole: str
    #: How many there are.
    processes: int
    #: Process ids of those that are probably to blame, the likeliest first.
    suspects: tuple[int, ...]


def diagnose(logs: Path, about: int | None = None) -> Diagnosis:
    """Look at all processes of a run on this host. Takes some seconds at most, and stops none of them.

    Args:
        logs: the run's logs folder.
        about: the process that is late: it, or one below it, is to blame.
    """
    processes = of_run(logs)
    # A thread each: of one that cannot be looked at, the others need not wait for.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pythons = [process for process in processes if process.is_python]
        found = pool.map(lambda process: stacks_of(process.pid, process.stopped), pythons)
        stacks = {process.pid: stack for process, stack in zip(pythons, found, strict=True)}
    now = time.monotonic()
    suspects = ranked(processes, about)
    lines = [line for process in processes for line in describe(process, now)]
    essence = "\n".join(lines or ["no process of this run is left on this host"])
    if suspects:
        essence += f"\n{_where(suspects[0], stacks.get(suspects[0].pid, ([], '')))}"
    whole = "\n\n".join([essence, *(_all(process, *stacks[process.pid]) for process in pythons)])
    return Diagnosis(essence, whole + "\n", len(processes), tuple(process.pid for process in suspects))


def ranked(processes: Sequence[RunProcess], about: int | None = None) -> list[RunProcess]:
    """Those that may be to blame, the likeliest first.

    One that was stopped; one that waits for a device; one that has been busy the longest; one that waits for
    others; one that says nothing. Among equals the one that is farthest from the driver: others wait for it.
    """
    below = [p for p in processes if about is None or about == p.pid or about in p.above]

    def rank(process: RunProcess) -> tuple[int, float, int]:
        entry = process.entry
        if process.stopped:
            kind = 0
        elif process.state == psutil.STATUS_DISK_SLEEP:
            kind = 1
        elif entry is None:
            # Of a late one that says nothing it is its own event loop that stands still.
            kind = 4 if process.pid != about else 3
        else:
            kind = 3 if WAITING in entry.phase else 2
        return kind, -len(process.above) if kind != 2 or entry is None else entry.since, process.pid

    return sorted(below, key=rank)


def describe(process: RunProcess, now: float) -> list[str]:
    """A line for each of its parts: name, process id, state, phase and since when, last message."""
    head = f"  {process.name} (process {process.pid}): {_state(process)}"
    if not process.entries:
        return [head]
    lines = []
    for entry in process.entries:
        phase = f"{entry.phase} for {now - entry.since:.1f} s" if entry.phase else "nothing to do"
        said = f'; last: "{entry.message}"' if entry.message else ""
        lines.append(f"{head}; {entry.part}: {phase}{said}")
    return lines


def write(logs: Path, what: str, whole: str) -> Path:
    """Put a dump beside the logs, under a name of its own."""
    name = re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")[:40]
    path = logs / f"hang-{name}-{time.strftime('%H-%M-%S')}.txt"
    path.write_text(whole)
    return path


def _state(process: RunProcess) -> str:
    if process.stopped:
        return f"STOPPED, by a signal or a debugger (`kill -CONT {process.pid}` lets it go on)"
    return {psutil.STATUS_DISK_SLEEP: "waits for a device", psutil.STATUS_ZOMBIE: "DEAD"}.get(
        process.state, process.state
    )


def _where(process: RunProcess, stacks: tuple[list[Thread], str]) -> str:
    threads, why = stacks
    thread = _of_interest(process, threads)
    if thread is None:
        reason = f": {why}" if why else ""
        return f"{process.name} (process {process.pid}) shows no stack{reason}"
    named = f", thread {thread.name}" if thread.name else ""
    frames = "".join(f"\n  {frame}" for frame in thread.frames[:FRAMES_SHOWN])
    return f"innermost frames of {process.name} (process {process.pid}{named}):{frames}"


def _of_interest(process: RunProcess, threads: Sequence[Thread]) -> Thread | None:
    """The thread whose phase it is; else the main one."""
    entry = process.entry
    wanted = [thread for thread in threads if entry is not None and thread.ident == entry.thread]
    main = [thread for thread in threads if thread.name == "MainThread"]
    return next(iter([*wanted, *main, *reversed(threads)]), None)


def _all(process: RunProcess, threads: Sequence[Thread], why: str) -> str:
    parts = [f"{process.name} (process {process.pid}):{f' no stacks: {why}' if not threads else ''}"]
    for thread in threads:
        parts.append(f"  thread {thread.name or hex(thread.ident)}")
        parts += [f"    {frame}" for frame in thread.frames]
    return "\n".join(parts)
