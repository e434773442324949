"""What runs in a child process of `rubrics.children`: `python -m rubrics.child module:function MIB MARK`.

This process imports the module, calls its `warm_up()` if there is one, and from then on forks the process
that works, as often as that ends. SIGUSR1 has it killed, SIGTERM ends both.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import msgspec

GRACE_S = 5.0
"""Seconds after its deadline at which a child whose parent did not kill it ends by itself."""


def serve(function: Callable[[Any], Any], requests: int, send: Callable[[dict[str, Any]], None]) -> None:
    """Answer calls until there are no more."""
    for name in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    send({"ready": os.getpid()})
    while (request := _receive(requests)) is not None:
        number, value, deadline_s = request
        # Its default action ends the process, in the midst of a computation that holds the interpreter.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, deadline_s + GRACE_S)
        try:
            answer = {"number": number, "value": function(value)}
        # Whatever it raises is the call's answer; memory that ran out, or a stack, too.
        except Exception as error:  # noqa: BLE001
            answer = {"number": number, "error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(answer)


def _receive(file: int) -> Any | None:
    header = _exactly(file, 4)
    body = None if header is None else _exactly(file, int.from_bytes(header, "big"))
    return None if body is None else msgspec.msgpack.decode(body)


def _exactly(file: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        chunk = os.read(file, size - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def main() -> None:
    target, mib, mark = sys.argv[1:4]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module_name, _, name = target.partition(":")
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    resource.setrlimit(resource.RLIMIT_AS, (int(mib) * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    working = 0

    def kill(number: int, frame: FrameType | None) -> None:
        if working:
            os.kill(working, signal.SIGKILL)
        if number == signal.SIGTERM:
            os._exit(0)

    def send(message: dict[str, Any]) -> None:
        body = msgspec.msgpack.encode(message)
        data = memoryview(bytes.fromhex(mark) + len(body).to_bytes(4, "big") + body)
        while data:
            data = data[os.write(answers, data) :]

    signal.signal(signal.SIGUSR1, kill)
    signal.signal(signal.SIGTERM, kill)
    while True:
        working = os.fork()
        if not working:
            serve(getattr(module, name), 0, send)
            os._exit(0)
        _, status = os.waitpid(working, 0)
        working = 0
        if status == 0:  # there are no more calls
            return


if __name__ == "__main__":
    main()
