"""The writable places of a container, bounded together where that can be had.

docker gives each tmpfs a size of its own. As root we mount one tmpfs, bind folders of it into the container
and unmount it again at once, so that it ends with the container, however we end. Without root each place gets
a share.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import docker

from sandboxes.base import Limits
from sandboxes.bubblewrap.agent import WRITABLE
from sandboxes.errors import SandboxUnavailableError

#: Of `Limits.disk_bytes` and `Limits.inodes`, where there is one file system for each place.
SHARES = dict(zip(WRITABLE, (12 / 16, 3 / 16, 1 / 16), strict=True))
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2


@dataclass(frozen=True)
class Places:
    """How docker is told of them."""

    mounts: list[docker.types.Mount] = field(default_factory=list)
    tmpfs: dict[str, str] = field(default_factory=dict)


def together() -> bool:
    """Whether the places share one file system: this process may mount."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    cap_sys_admin = 21
    return bool(int(status["CapEff"], 16) >> cap_sys_admin & 1)


@contextmanager
def writable_places(folder: Path, limits: Limits, user: str) -> Iterator[Places]:
    """Places for a container that is started before the context ends.

    Args:
        folder: does not exist; is used meanwhile.
        user: whose they are, as `uid:gid`.

    Raises:
        SandboxUnavailableError: the file system cannot be mounted.
    """
    uid, gid = map(int, user.split(":"))
    if not together():
        options = f"rw,nosuid,nodev,exec,mode=755,uid={uid},gid={gid}"
        yield Places(
            tmpfs={
                place: f"{options},size={int(limits.disk_bytes * share)},"
                f"nr_inodes={max(2, int(limits.inodes * share))}"
                for place, share in SHARES.items()
            }
        )
        return
    folder.mkdir()
    try:
        options = f"size={limits.disk_bytes},nr_inodes={limits.inodes},mode=755"
        _checked("mount", b"k2rl", os.fsencode(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())
        try:
            mounts = []
            for number, place in enumerate(WRITABLE):
                inner = folder / str(number)
                inner.mkdir(mode=0o755)
                os.chown(inner, uid, gid)
                # A source that the daemon does not see is an error, other than with `binds`.
                mounts.append(docker.types.Mount(place, str(inner), type="bind"))
            yield Places(mounts=mounts)
        finally:
            unmount(folder)
    finally:
        folder.rmdir()


def unmount(folder: Path) -> None:
    """Take it out of sight; it lives on where it is bound."""
    _checked("umount2", os.fsencode(folder), MNT_DETACH)


def _checked(name: str, *arguments: bytes | int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) == -1:
        problem = os.strerror(ctypes.get_errno())
        raise SandboxUnavailableError(f"{name} of a sandbox's writable places: {problem}")
