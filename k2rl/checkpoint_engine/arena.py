"""A host's shared memory: trainer ranks write weights into it, inference workers on the host map it.

An arena is an anonymous memory file: it has no name to collide on or leak, and the kernel frees it when the
last process that maps it is gone, however that process ended. Every process that maps it can hand it on.

It is opened by paths such as `/proc/12/fd/7`, and process ids are used again: behind such a path there may be
another file by now. So each arena has a random name, which the kernel shows to whoever asks what is there.
(Inode numbers may come again after a restart of the host, and a tag in the memory could only be read after
opening whatever there is.)
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from k2rl.checkpoint_engine.messages import DeltaRefusedError, TransferError
from k2rl.checkpoint_engine.plan import Plan, aligned
from k2rl.workers.memory import release

#: The names of all arenas begin like this.
PREFIX = "k2rl-weights-"


class ArenaLostError(TransferError):
    """None of the paths leads to the arena any more."""

    arena_lost = True


class Arena:
    """A mapping of a host's arena, as one uint8 tensor."""

    def __init__(self, fd: int, name: str, writable: bool) -> None:
        self._fd = fd
        #: Unlike any other's.
        self.name = name
        self.nbytes = os.fstat(fd).st_size
        # Receivers map it privately: torch wants writable memory, and the senders' bytes stay the senders'.
        flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
        self._buffer = mmap.mmap(fd, max(self.nbytes, 1), flags=flags)
        self.memory = torch.frombuffer(self._buffer, dtype=torch.uint8)

    @classmethod
    def create(cls, nbytes: int) -> Arena:
        """A new one; the kernel provides its pages as they are first written."""
        name = PREFIX + secrets.token_hex(8)
        fd = os.memfd_create(name)
        os.ftruncate(fd, nbytes)
        return cls(fd, name, writable=True)

    @classmethod
    def open(cls, paths: Sequence[str], name: str, writable: bool) -> Arena:
        """Map an existing one by the first path that leads to it.

        Args:
            paths: under which it could be opened once.
            name: the arena's.
            writable: shared with all who map it; otherwise what is written stays in this process.

        Raises:
            ArenaLostError: none does any more.
        """
        problems = []
        for path in paths:
            try:
                # Before opening: a device or a pipe may do something when it is opened.
                _check(path, name)
                fd = os.open(path, os.O_RDWR)
                try:
                    _check(f"/proc/self/fd/{fd}", name)
                except OSError:
                    os.close(fd)
                    raise
                return cls(fd, name, writable)
            except OSError as error:
                problems.append(str(error))
        raise ArenaLostError(f"cannot map the weights: {'; '.join(problems) or 'no path was given'}")

    @property
    def path(self) -> str:
        """Under which other processes of this user and host can open it, while this process has it open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def release(self, start: int, stop: int) -> None:
        """Give the memory of these bytes back to the system, whoever has them mapped: they read as zeros."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self._buffer.madvise(mmap.MADV_REMOVE, first, last - first)

    def close(self) -> None:
        """Let go of it; the mapping itself goes with its last tensor view."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self.memory, self._buffer


def _check(path: str, name: str) -> None:
    """Raises:
    OSError: it is not the arena of that name which is open there.
    """
    found = str(Path(path).readlink())
    if found.removesuffix(" (deleted)") != f"/memfd:{name}":
        raise FileNotFoundError(f"{path} leads to {found} by now, and not to {name}")


class ArenaCache:
    """A participant's mapping, kept from push to push: mapping a gigabyte anew costs its page faults anew."""

    def __init__(self, writable: bool, replaced: Callable[[], None]) -> None:
        """
        Args:
            writable: see `Arena.open`.
            replaced: lets go of everything that looks into the mapping: it is about to be another.
        """
        self._writable = writable
        self._replaced = replaced
        self._arena: Arena | None = None

    def open(self, paths: Sequence[str], name: str) -> Arena:
        """The mapping of the arena of that name; see `Arena.open`."""
        if self._arena is None or self._arena.name != name:
            fresh = Arena.open(paths, name, self._writable)
            self.close()
            self._arena = fresh
        return self._arena

    def unload(self) -> None:
        """Hold none of its memory until it is next read; what is mapped stays mapped."""
        if self._arena is not None:
            release([self._arena.memory])

    def close(self) -> None:
        if self._arena is not None:
            self._replaced()
            self._arena.close()
            self._arena = None


class HostArena:
    """The arena as its host's agent owns it: room for two whole versions, or for one ring of slots."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._writing = 0
        #: The arena and first byte of the committed version, while it is kept.
        self.committed: tuple[Arena, int] | None = None
        #: Number of the committed version, while it is kept.
        self._version: int | None = None
        #: First bytes and ends, in the plan's places, of what differs between the committed version and the
        #: other half of the arena; None: all of it may.
        self._behind: list[tuple[int, int]] | None = None

    def reserve(self, plan: Plan) -> tuple[Arena, int]:
        """Where a push may write: the arena and the first byte, away from the committed version.

        For a delta that retains, a copy of the committed version lies there already, to be written over.

        Raises:
            DeltaRefusedError: the committed version is not the one that a delta builds on.
        """
        if plan.base is not None and plan.retains and plan.base != self._version:
            kept = "no version" if self._version is None else f"version {self._version}"
            raise DeltaRefusedError(f"{kept} is kept here, and the delta builds on version {plan.base}")
        half = aligned(plan.arena_bytes)
        needed = half * 2 if plan.retains else plan.arena_bytes
        arena = self._arena
        if arena is None or arena.nbytes < needed:
            # The committed version stays in the old arena until the next one is committed.
            self._let_go()
            arena = self._arena = Arena.create(needed)
        if not plan.retains:
            if self.committed is not None and self.committed[0] is not arena:
                self.committed[0].close()
            self.committed = self._version = None
            self._writing = 0
        elif self.committed is not None and self.committed[0] is arena and self.committed[1] < half:
            self._writing = arena.nbytes - half
        else:
            self._writing = 0
        behind, self._behind = self._behind, None
        if plan.base is not None and plan.retains:
            self._catch_up(plan, behind)
        return arena, self._writing

    def _catch_up(self, plan: Plan, behind: list[tuple[int, int]] | None) -> None:
        """Copy the committed version to where the next will be: after a delta, only what that one brought."""
        assert self.committed is not None
        arena, start = self.being_written
        source, first = self.committed
        for begin, end in [(0, plan.arena_bytes)] if behind is None else behind:
            arena.memory[start + begin : start + end] = source.memory[first + begin : first + end]

    @property
    def being_written(self) -> tuple[Arena, int]:
        """What `reserve` gave last."""
        assert self._arena is not None
        return self._arena, self._writing

    def abandon(self) -> None:
        """Never use again what `reserve` gave last: somebody who cannot be reached may yet write there.

        Its memory is freed, the committed version's is not.
        """
        arena, start = self.being_written
        keeps = self.committed is not None and self.committed[0] is arena
        if keeps and start == 0:
            arena.release(0, self.committed[1] if self.committed else 0)
        else:
            arena.release(start, arena.nbytes)
        self._let_go()

    def _let_go(self) -> None:
        """The arena is not written any more; it stays as long as the committed version lies in it."""
        if self._arena is not None and (self.committed is None or self.committed[0] is not self._arena):
            self._arena.close()
        self._arena = self._behind = None

    def commit(self, plan: Plan, version: int) -> None:
        """What was written last is the version to keep."""
        before = self.committed
        self.committed = self.being_written if plan.retains else None
        self._version = version if plan.retains else None
        if plan.base is not None and before is not None and before[0] is self._arena:
            self._behind = [
                (bucket.offset + block.offset, bucket.offset + block.offset + block.nbytes)
                for bucket in plan.buckets
                for block in bucket.blocks
            ]
        if before is not None and before[0] is not self._arena:
            before[0].close()

    def close(self) -> None:
        for arena in {id(a): a for a in (self._arena, self.committed and self.committed[0]) if a}.values():
            arena.close()
        self._arena = self.committed = self._version = self._behind = None
