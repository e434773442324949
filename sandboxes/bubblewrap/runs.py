"""One run as the driver sees it: its output as it streams in, its deadline, why it ended."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Callable

from sandboxes.base import Ended, ExecResult, Limits

CHUNK = 1 << 16
#: Of Linux: seal a memory file against any change, its size and its seals included.
ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8


class Run:
    """The driver's ends of a run's pipes.

    Args:
        number: what the agent knows it by.
        limit: most bytes of stdout and stderr together.
        kill: asks the agent to end the run.
    """

    def __init__(self, number: int, limit: int, kill: Callable[[int], None]) -> None:
        self.number = number
        self.limit = limit
        self.ended: Ended | None = None
        self.output: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self.done: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self.began = time.monotonic()
        self._kill = kill
        self._readers: dict[int, bytearray] = {}

    def listen(self, stdout: int, stderr: int) -> None:
        """Take what comes through two pipes, whose descriptors are the run's from now on."""
        loop = asyncio.get_running_loop()
        for descriptor, buffer in zip((stdout, stderr), self.output, strict=True):
            os.set_blocking(descriptor, False)
            self._readers[descriptor] = buffer
            loop.add_reader(descriptor, self._read, descriptor)

    def end(self, reason: Ended) -> None:
        """Have the run ended for this reason, if it does not end for another before."""
        if self.ended is None:
            self.ended = reason
            self._kill(self.number)

    def finish(self, code: int, cpu_microseconds: int) -> None:
        """Every process of the run has ended: take what is left in the pipes."""
        for descriptor in list(self._readers):
            while descriptor in self._readers and self._read(descriptor):
                pass
        self.close()
        if not self.done.done():
            self.done.set_result((code, cpu_microseconds))

    def fail(self, error: Exception) -> None:
        self.close()
        if not self.done.done():
            self.done.set_exception(error)

    def close(self) -> None:
        """Take no more output."""
        for descriptor in list(self._readers):
            self._stop(descriptor)

    def result(self, code: int, cpu_microseconds: int, limits: Limits, out_of_memory: bool) -> ExecResult:
        """What became of it.

        Args:
            out_of_memory: whether the kernel killed a process for memory meanwhile.
        """
        ended = self.ended
        if ended in ("timed_out", "out_of_memory") and code >= 0:
            ended = "exited"  # it was faster than the kill
        if ended is None:
            of_cpu = cpu_microseconds >= limits.cpu_seconds * 1e6
            if out_of_memory and code != 0:
                ended = "out_of_memory"
            elif code == -signal.SIGXCPU or (code == -signal.SIGKILL and of_cpu):
                ended = "timed_out"
            else:
                ended = "killed" if code == -signal.SIGKILL else "exited"
        stdout, stderr = map(bytes, self.output)
        seconds = time.monotonic() - self.began
        return ExecResult(exit_code=code, stdout=stdout, stderr=stderr, duration=seconds, ended=ended)

    def _read(self, descriptor: int) -> bool:
        """Whether there may be more."""
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._stop(descriptor)
            return False
        return self._take(self._readers[descriptor], data)

    def _take(self, buffer: bytearray, data: bytes) -> bool:
        """Whether more is wanted."""
        room = self.limit - sum(map(len, self.output))
        buffer += data[:room]
        if len(data) > room:
            self.close()
            self.end("output_limit")
            return False
        return True

    def _stop(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        del self._readers[descriptor]
        os.close(descriptor)


def pipes(count: int) -> list[tuple[int, int]]:
    """So many pipes, or none and an OSError."""
    made: list[tuple[int, int]] = []
    try:
        for _ in range(count):
            made.append(os.pipe())  # noqa: PERF401 - what was made before an error must be known
    except OSError:
        for descriptor in (each for pair in made for each in pair):
            os.close(descriptor)
        raise
    return made


def sealed(name: str, content: bytes) -> int:
    """A descriptor from which this content can be read, and through which nothing can be changed."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError:
        os.close(descriptor)
        raise
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)
    return descriptor
