"""What an agent says first, and the socket that comes along with it."""

from __future__ import annotations

import asyncio
import os
import socket

from sandboxes.errors import SandboxError


async def first_words(connection: socket.socket, seconds: float) -> tuple[bytes, socket.socket | None]:
    """The first packet, and the TCP listener that it brings, if it does.

    Raises:
        TimeoutError: nothing came.
        ConnectionResetError: the other end is gone.
        SandboxError: what it brings is something else.
    """
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, lambda: None if readable.done() else readable.set_result(None))
    try:
        await asyncio.wait_for(readable, seconds)
    finally:
        loop.remove_reader(connection)
    words, descriptors, _, _ = socket.recv_fds(connection, 1 << 17, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        return words, None
    try:
        brought = socket.socket(fileno=descriptors[0])
    except OSError:
        os.close(descriptors[0])
        raise SandboxError("a sandbox's first process handed out what is no socket") from None
    listens = brought.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (brought.family, brought.type, listens) != (socket.AF_INET, socket.SOCK_STREAM, 1):
        brought.close()
        raise SandboxError("a sandbox's first process handed out a socket that is no TCP listener")
    return words, brought
