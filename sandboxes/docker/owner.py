"""Whose container is whose: a label that names the process, so that those of dead ones can be told."""

from __future__ import annotations

import os
from pathlib import Path

from sandboxes.bubblewrap.cgroups import started

LABEL = "k2rl.owner"


def mine() -> str:
    """This process: a pid may come again, but not with its start time, in its namespace, since the boot."""
    return f"{_where()}/{os.getpid()}/{started(os.getpid())}"


def is_dead(owner: str) -> bool:
    """Whether the process is one of this machine and has ended; of others nothing can be said."""
    where, _, process = owner.partition("/")
    if where != _where():
        return False
    pid, _, start = process.partition("/")
    try:
        return started(int(pid)) != int(start)
    except (FileNotFoundError, ProcessLookupError):
        return True


def _where() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
