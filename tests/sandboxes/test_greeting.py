"""What a sandbox's first process says."""

from __future__ import annotations

import asyncio
import socket

import pytest

from sandboxes.bubblewrap.greeting import first_words


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def test_a_socket_that_is_called_readable_and_has_nothing_is_waited_for(monkeypatch) -> None:
    receive, empty = socket.recv_fds, [BlockingIOError(11, "Resource temporarily unavailable")]

    def recv_fds(*arguments):
        if empty:
            raise empty.pop()
        return receive(*arguments)

    monkeypatch.setattr(socket, "recv_fds", recv_fds)
    ours, theirs = pair()
    with ours, theirs:
        theirs.send(b"ready")
        assert asyncio.run(first_words(ours, 20)) == (b"ready", None)


def test_the_end_of_the_other_side_and_silence() -> None:
    ours, theirs = pair()
    with ours, theirs:
        with pytest.raises(TimeoutError):
            asyncio.run(first_words(ours, 0.01))
        theirs.close()
        assert asyncio.run(first_words(ours, 20)) == (b"", None)
