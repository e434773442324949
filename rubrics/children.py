"""Work that may hang or eat memory, in child processes that can be killed, from any thread.

A child runs one function (`module:name`, from and to plain values) for one call after the other. It is forked
from a process that has imported what the function needs and does nothing else: a call that is not over at
its deadline costs the child its life, and the next one is there at once. A child whose parent is gone is
ended by its own alarm, whatever it computes.
"""

from __future__ import annotations

import asyncio
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

START_S = 120.0
"""Seconds for a child to import what it needs."""
WAIT_S = 300.0
"""Seconds a call waits for a free child."""
MARK_BYTES = 16
MOST_BYTES = 8 * 2**20


class ChildError(Exception):
    """A call had no result: the function raised, or its child died or was killed."""


class ChildTimeoutError(ChildError):
    """It was not over at its deadline."""


class Children:
    """At most `size` child processes for one function; threads may share it."""

    def __init__(self, function: str, size: int = 2, memory_mib: int = 2048) -> None:
        self._command = [sys.executable, "-m", "rubrics.child", function, str(memory_mib)]
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(size):
            self._free.put(None)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="children")
        self._alive: weakref.WeakSet[_Child] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, _end_all, self._alive)

    def call(self, value: Any, deadline_s: float) -> Any:
        """The function's result; the deadline counts from when a child has the call.

        Raises:
            ChildError: there is none, and why.
        """
        try:
            child = self._free.get(timeout=WAIT_S)
        except queue.Empty:
            raise ChildTimeoutError(f"no child was free within {WAIT_S:g} s") from None
        try:
            if child is None or not child.alive:
                child = _Child(self._command)
                self._alive.add(child)
            result = child.ask(value, deadline_s)
        except OSError as error:
            if child is not None:
                child.end()
            raise ChildError(f"no child process: {error}") from error
        finally:
            self._free.put(child)
        if "error" in result:
            raise ChildError(str(result["error"]))
        return result["value"]

    async def acall(self, value: Any, deadline_s: float) -> Any:
        """As `call`, without blocking the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.call, value, deadline_s)

    def close(self) -> None:
        """Kill the children; a later call starts others."""
        _end_all(self._alive)


class _Child:
    """A process that forks the one that works, over and over."""

    def __init__(self, command: list[str]) -> None:
        self._mark = os.urandom(MARK_BYTES)
        self._process = subprocess.Popen(
            [*command, self._mark.hex()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._ready = False
        self._number = 0
        self._read = bytearray()
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, value: Any, deadline_s: float) -> dict[str, Any]:
        """The answer to a call.

        Raises:
            ChildError: there is none; the next call finds a new child.
        """
        start = time.monotonic() + START_S
        while not self._ready:
            self._ready = "ready" in self._frame(start, f"a child did not start within {START_S:g} s")
        self._number += 1
        body = msgspec.msgpack.encode([self._number, value, deadline_s])
        until = time.monotonic() + deadline_s
        late = f"not over within {deadline_s:g} s"
        self._write(len(body).to_bytes(4, "big") + body, until, late)
        while True:
            answer = self._frame(until, late)
            if "ready" in answer:  # of its successor
                raise ChildError("the process that computed it died")
            if answer["number"] == self._number:
                return answer

    def end(self) -> None:
        """Kill both processes."""
        with self._lock:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)  # its child first
                try:
                    self._process.wait(5)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()

    def _replace(self) -> None:
        """Have the one that works killed, and its successor forked."""
        self._ready = False
        self._process.send_signal(signal.SIGUSR1)

    def _write(self, data: bytes, until: float, late: str) -> None:
        view = memoryview(data)
        while view:
            left = until - time.monotonic()
            if left <= 0 or not select.select([], [self._in], [], left)[1]:
                self.end()  # its successor would read the rest of this call as one
                raise ChildTimeoutError(late)
            view = view[os.write(self._in, view) :]

    def _frame(self, until: float, late: str) -> dict[str, Any]:
        """The next whole message; what a killed child left unfinished is passed over."""
        while True:
            start = self._read.rfind(self._mark) if not self._ready else self._read.find(self._mark)
            body = start + MARK_BYTES + 4
            if start >= 0 and len(self._read) >= body:
                size = int.from_bytes(self._read[body - 4 : body], "big")
                if size > MOST_BYTES:
                    self._replace()
                    raise ChildError(f"an answer of {size} bytes is too large")
                if len(self._read) >= body + size:
                    message: dict[str, Any] = msgspec.msgpack.decode(self._read[body : body + size])
                    del self._read[: body + size]
                    return message
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._out], [], [], left)[0]:
                self._replace()
                raise ChildTimeoutError(late)
            chunk = os.read(self._out, 65536)
            if not chunk:
                self.end()
                raise ChildError(f"a child could not start or died (exit status {self._process.returncode})")
            self._read += chunk


def _end_all(children: weakref.WeakSet[_Child]) -> None:
    for child in list(children):
        child.end()
