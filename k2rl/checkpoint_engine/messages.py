"""What coordinator, senders, receivers and host agents say to each other: typed, framed, with deadlines.

A frame is four bytes of length and a msgpack body; nothing that arrives is ever executed or unpickled.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import struct
from contextlib import suppress
from typing import TypeVar

import msgspec

from k2rl.checkpoint_engine.plan import Plan

_LENGTH = struct.Struct("!I")
#: A plan for a large model has some ten megabytes; anything longer than this is not one of ours.
MAX_FRAME_BYTES = 1 << 28
#: Nor is a longer first word, from somebody whose token is not yet known.
MAX_HELLO_BYTES = 1 << 12
#: Longest wait for the coordinator to hear why a participant leaves.
FAREWELL_S = 5.0


class TransferError(Exception):
    """A push did not arrive as it was sent, or did not arrive."""

    #: Whether it was refused because of what it builds on: a push of everything would be taken.
    refused = False
    #: Whether there is no way to the host's arena any more.
    arena_lost = False


class DeltaRefusedError(TransferError):
    """Here is not what a delta builds on; nothing was changed."""

    refused = True


class Peer(msgspec.Struct, frozen=True, order=True):
    """A participant of a push: trainer rank, inference worker or host agent number `rank`."""

    role: str
    rank: int

    def __str__(self) -> str:
        return f"{self.role} {self.rank}"


SENDER, RECEIVER, AGENT = "trainer rank", "receiver", "host agent"


class Message(msgspec.Struct, frozen=True, tag=True):
    """Anything that is sent."""


class Hello(Message, frozen=True):
    """First word of a participant."""

    token: str
    peer: Peer
    host: int
    pid: int
    #: Digest of the plan that it followed last.
    plan: str


class Begin(Message, frozen=True):
    """The push that everybody takes part in. `arenas`: paths under which this host's arena may be opened."""

    version: int
    plan_digest: str
    #: Left out for those who have it from the last push.
    plan: Plan | None
    arenas: tuple[str, ...]
    #: First byte, in the arena, of the plan's places.
    base: int
    deadline_s: float
    #: By which the arena is known.
    arena_name: str = ""


class Held(msgspec.Struct, frozen=True):
    """A whole version in the arena of `host`, for hosts that have no part of it; fields as in `Begin`."""

    host: int
    arenas: tuple[str, ...]
    base: int
    arena_name: str


class Prepare(Message, frozen=True):
    """To a host agent, in place of `Begin`: make room for this push, and meet the other hosts."""

    version: int
    plan_digest: str
    plan: Plan | None
    #: On which host each owner is.
    host_of: dict[int, int]
    hosts: tuple[int, ...]
    #: Where the agents find each other, and a number that is new after every failure.
    store: tuple[str, int]
    epoch: int
    #: Where everything comes from, if not from trainer ranks.
    held: Held | None = None


class Prepared(Message, frozen=True):
    """A host agent has room: where its host's senders and receivers find it."""

    arena: str
    base: int
    arena_name: str = ""


class Filled(Message, frozen=True):
    """A sender has written its parts of a bucket; their digest."""

    bucket: int
    digest: str
    #: Of a delta that the arena retains: of this sender's parts of the whole bucket, unchanged ones included.
    whole: str = ""


class Free(Message, frozen=True):
    """A bucket's place may be written again: everybody has applied what lay in it."""

    bucket: int


class Transfer(Message, frozen=True):
    """To host agents: bring this bucket to every host."""

    bucket: int


class Transferred(Message, frozen=True):
    """A host agent has the whole bucket in its arena; its digests, if it came from an arena (`Held`)."""

    bucket: int
    digests: dict[int, str] = {}


class Deliver(Message, frozen=True):
    """A bucket lies ready; the digest of each owner's parts."""

    bucket: int
    digests: dict[int, str]


class Applied(Message, frozen=True):
    """A receiver has read, checked and placed a bucket; the digests of what it placed."""

    bucket: int
    digests: dict[int, str]


class Finish(Message, frozen=True):
    """Everything was delivered: do what comes after loading, and vote."""


class Finished(Message, frozen=True):
    """A receiver's vote: the whole version is in place, and `digest` is that of all it applied."""

    digest: str
    #: Where this receiver's own mapping of the arena can be opened.
    arena: str
    #: Sets of tensors that it takes whole and together or not at all, in the deltas that follow.
    together: tuple[tuple[str, ...], ...] = ()


class Commit(Message, frozen=True):
    """All voted for it: the version may be served."""


class Committed(Message, frozen=True):
    """The receiver has taken the version."""


class Alive(Message, frozen=True):
    """From the coordinator, now and then: others are still at work, keep waiting."""


class Abort(Message, frozen=True):
    """The push failed; whoever has begun to apply it stays fenced."""

    reason: str


class Failed(Message, frozen=True):
    """A participant cannot go on; a host agent says with which other host it failed, if it knows."""

    reason: str
    blamed_host: int | None = None
    refused: bool = False
    #: Because none of the paths leads to the host's arena.
    arena_lost: bool = False


AnyMessage = (
    Hello
    | Begin
    | Prepare
    | Prepared
    | Filled
    | Free
    | Transfer
    | Transferred
    | Deliver
    | Applied
    | Finish
    | Finished
    | Commit
    | Committed
    | Alive
    | Abort
    | Failed
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The frame of a message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """Raises:
    TransferError: not one of our messages.
    """
    try:
        message: Message = _decoder.decode(body)
        return message
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"not a message of this protocol: {error}") from error


def frame_length(prefix: bytes, most: int = MAX_FRAME_BYTES) -> int:
    """Raises:
    TransferError: longer than any message of ours.
    """
    (length,) = _LENGTH.unpack(prefix)
    if length > most:
        raise TransferError(f"a frame of {length} bytes is not of this protocol")
    return int(length)


async def read_message(reader: asyncio.StreamReader, most: int = MAX_FRAME_BYTES) -> Message:
    """Raises:
    asyncio.IncompleteReadError: the connection was closed.
    TransferError: not one of our messages.
    """
    prefix = await reader.readexactly(_LENGTH.size)
    return decode(await reader.readexactly(frame_length(prefix, most)))


class Address(msgspec.Struct, frozen=True):
    """Where a coordinator listens, and the secret that its participants must know.

    `path` is a socket of this host, reachable by this user only; `endpoint` is (host, port) for others.
    """

    token: str
    path: str = ""
    endpoint: tuple[str, int] | None = None


class PushInvitation(msgspec.Struct, frozen=True):
    """To an engine's workers: where a push's coordinator listens, and who they are in it."""

    address: Address
    deadline_s: float
    #: Receiver number of the engine's tensor-parallel rank 0.
    first_receiver: int = 0
    host: int = 0


class Outcome(msgspec.Struct, frozen=True):
    """From an engine's worker: how its part in a push ended."""

    #: Why it failed; empty: it has what was pushed.
    error: str = ""
    #: Whether it refused a delta, unchanged.
    refused: bool = False


class Channel:
    """A participant's connection to the coordinator of one push; blocking, every wait with a deadline."""

    def __init__(
        self, address: Address, peer: Peer, deadline_s: float, host: int = 0, plan: str = ""
    ) -> None:
        """Connect and introduce oneself.

        Args:
            address: the coordinator's.
            peer: who we are.
            deadline_s: longest silence of the coordinator, which says now and then that it is there.
            host: number of the host we are on.
            plan: digest of the plan that we know.

        Raises:
            TransferError: nobody listens there.
        """
        self._deadline_s = deadline_s
        try:
            if address.path:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(deadline_s)
                self._socket.connect(address.path)
            else:
                assert address.endpoint is not None
                self._socket = socket.create_connection(address.endpoint, deadline_s)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise TransferError(f"{peer} cannot reach the coordinator: {error}") from error
        self.send(Hello(address.token, peer, host, os.getpid(), plan))

    def send(self, message: Message) -> None:
        """Raises:
        TransferError: the coordinator is gone or does not read.
        """
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise TransferError(f"the coordinator is gone: {error}") from error

    def receive(self) -> Message:
        """The coordinator's next message.

        Raises:
            TransferError: it is gone, silent for too long, or says that the push failed.
        """
        message: Message = Alive()
        while isinstance(message, Alive):
            message = decode(self._read(frame_length(self._read(_LENGTH.size))))
        if isinstance(message, Abort):
            raise TransferError(message.reason)
        return message

    def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind; raises as `receive` does."""
        message = self.receive()
        if not isinstance(message, kind):
            raise TransferError(f"expected {kind.__name__}, got {message}")
        return message

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        view, got = memoryview(data), 0
        try:
            while got < length:
                count = self._socket.recv_into(view[got:])
                if not count:
                    raise TransferError("the coordinator closed the connection")
                got += count
        except TimeoutError as error:
            raise TransferError(f"the coordinator was silent for {self._deadline_s:g} s") from error
        except OSError as error:
            raise TransferError(f"the coordinator is gone: {error}") from error
        return bytes(data)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # So that the coordinator learns why, and not only that the connection closed.
        if error is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            with suppress(OSError):
                self._socket.sendall(encode(_failed(reason, error)))
                # Closing before it has answered would reset the connection, and lose what was said.
                self._socket.settimeout(min(self._deadline_s, FAREWELL_S))
                while self._socket.recv(1 << 16):
                    pass
        self.close()


def _failed(reason: str, error: BaseException) -> Failed:
    host = getattr(error, "host", None)
    if isinstance(error, TransferError):
        return Failed(reason, host, error.refused, error.arena_lost)
    return Failed(reason, host)


def same_token(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
