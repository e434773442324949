"""What an agent says first, and the socket that comes along with it."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

from sandboxes.errors import SandboxError


async def first_words(connection: socket.socket, seconds: float) -> tuple[bytes, socket.socket | None]:
    """The first packet, and the TCP listener that it brings, if it does.

    Raises:
        TimeoutError: nothing came.
        ConnectionResetError: the other end is gone.
        SandboxError: what it brings is something else.
    """
    words, descriptors = await asyncio.wait_for(_packet(connection), seconds)
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


async def _packet(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The next packet, and the descriptors that come with it."""
    loop = asyncio.get_running_loop()
    while True:
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(connection, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(connection)
        # A socket may be called readable and have nothing, as one is that had this one's number before.
        with suppress(BlockingIOError):
            words, descriptors, _, _ = socket.recv_fds(connection, 1 << 17, 1, socket.MSG_CMSG_CLOEXEC)
            return words, descriptors


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
