"""Bytes from the host that has them to all others, over TCP.

The hosts are a ring: each has a connection from the one before it and one to the one after it. What a host
has goes round in messages of a mebibyte, and every host passes a message on as soon as it has it: every link
carries every byte once, and all are busy at the same time. A message may consist of many pieces of memory,
which the kernel gathers and scatters: nothing is copied besides.

gloo's broadcast is a tree, whose root sends everything twice with three hosts, and more often with more. A
ring made of gloo's own messages was slower than that tree where the processor sets the limit: each of them is
announced and answered, and has one piece of memory (`benchmarks/weight_hosts.py`).
"""

from __future__ import annotations

import hmac
import queue
import re
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from k2rl.checkpoint_engine.runs import Message, Run, messages

#: Before each message: the bucket's number, the source, and the message's number among those of that source.
_HEADER = struct.Struct("!QQQ")
#: First word on a connection: the random token that the listening host has put into the store.
_TOKEN_BYTES = 16


class RelayError(RuntimeError):
    """A transfer between hosts that did not happen; `host` is the peer it failed with, if that is known.

    That peer may itself have been waiting for another: `transaction.culprits` knows when all have been heard.
    """

    def __init__(self, message: str, host: int | None = None) -> None:
        super().__init__(message)
        self.host = host


class HostRelay:
    """One host's place in the ring; its connections are kept from transfer to transfer."""

    def __init__(
        self,
        host: int,
        hosts: Sequence[int],
        store: Store | tuple[str, int],
        epoch: int,
        deadline_s: float,
        interface: str | None = None,
    ) -> None:
        """Connect; returns once the neighbours in the ring have.

        Args:
            host: this host's number.
            hosts: the numbers of all that take part.
            store: where they find each other: a store, or address and port of a `TCPStore`.
            epoch: another for every relay that uses the store.
            deadline_s: for connecting, and of a neighbour's silence in a transfer.
            interface: network interface to use. Default: the one that leads to the store.

        Raises:
            RelayError: names the hosts that have not come.
        """
        self.host = host
        self.hosts = tuple(sorted(hosts))
        self._deadline_s = deadline_s
        here = self.hosts.index(host)
        self._before, self._after = self.hosts[here - 1], self.hosts[(here + 1) % len(self.hosts)]
        self._error: RelayError | None = None
        #: From the host before, and to the one after.
        self._connections: tuple[socket.socket, socket.socket] | None = None
        if len(self.hosts) == 1:
            return
        place: Store | None = None
        try:
            limit = timedelta(seconds=deadline_s)
            if isinstance(store, tuple):
                store = TCPStore(store[0], store[1], is_master=False, timeout=limit, wait_for_workers=False)
            address = _address(store, interface)
            place = PrefixStore(f"relay/{epoch}", store)
            self._connections = self._meet(place, address)
        except (RuntimeError, OSError) as error:
            if place is None:
                raise RelayError(
                    f"host {host} cannot reach the store of epoch {epoch}: {_line(error)}"
                ) from error
            missing = self._missing(place)
            raise RelayError(
                f"host {host} waited {deadline_s:g} s for hosts {missing} in epoch {epoch}: {_line(error)}",
                missing[0],
            ) from error

    def _meet(self, place: Store, address: str) -> tuple[socket.socket, socket.socket]:
        """Let the host before connect to this one, and connect to the one after."""
        ends = time.monotonic() + self._deadline_s
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        token = secrets.token_bytes(_TOKEN_BYTES)
        with ExitStack() as stack:
            server = stack.enter_context(socket.create_server((address, 0), family=family))
            place.set(f"host/{self.host}", f"{token.hex()} {server.getsockname()[1]} {address}")
            place.wait([f"host/{other}" for other in self.hosts], timedelta(seconds=self._deadline_s))
            word, port, there = place.get(f"host/{self._after}").decode().split()
            after = stack.enter_context(socket.create_connection((there, int(port)), _left_s(ends)))
            after.sendall(bytes.fromhex(word))
            before = stack.enter_context(_accepted(server, token, ends))
            for connection in (before, after):
                self._limit(connection)
            server.close()
            stack.pop_all()
        return before, after

    def _limit(self, connection: socket.socket) -> None:
        """Calls that block until a whole message has passed; the kernel ends one that hears nothing."""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = int(self._deadline_s)
        limit = struct.pack("@ll", seconds, int((self._deadline_s - seconds) * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, limit)

    def transfer(self, memory: torch.Tensor, runs: Sequence[Run], number: int = 0) -> None:
        """Copy each run from its source into the same place of every other host's memory.

        One at a time; all hosts call it with the same arguments but `memory`. It returns when this host has
        all it should get and needs its memory no longer for others; it does not say that others have got
        theirs.

        Args:
            memory: [bytes] uint8, the bucket in this host's arena.
            runs: what to move; they do not overlap.
            number: the bucket's. Hosts that are at different buckets fail, and nothing arrives in the wrong
                one.

        Raises:
            RelayError: a neighbour is gone, or silent for as long as the deadline. The relay is closed: what
                `memory` holds is undefined, and a new relay, of another epoch, must be made.
        """
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise ValueError(
                f"the memory of a bucket is a row of bytes, not {memory.dtype}{list(memory.shape)}"
            )
        if any(run.offset < 0 or run.offset + run.nbytes > len(memory) for run in runs):
            raise ValueError(f"runs reach beyond the {len(memory)} bytes of the bucket")
        if len(self.hosts) == 1:
            return
        if self._connections is None:
            raise RelayError(f"host {self.host}: the relay is closed")
        before, after = self._connections
        lanes = messages(runs)
        own = lanes.pop(self.host, [])
        bucket = _Bucket(memory.numpy().data, lanes, number)
        # What comes from the host after has been everywhere.
        onward = sum(len(lane) for source, lane in lanes.items() if source != self._after)
        passed: queue.SimpleQueue[_Passed] = queue.SimpleQueue()
        sending = threading.Thread(target=self._send, args=(after, bucket, own, onward, passed))
        if own or onward:
            sending.start()
        try:
            self._receive(before, bucket, passed)
        except OSError as error:
            self._fail(self._before, error)
        except BaseException:
            self._wake()
            raise
        finally:
            if own or onward:
                passed.put(None)
                sending.join()
        lost, self._error = self._error, None
        if lost is not None:
            self.close()
            try:
                raise lost
            finally:
                del lost  # its traceback would hold itself, and the memory with it

    def _receive(
        self, connection: socket.socket, bucket: _Bucket, passed: queue.SimpleQueue[_Passed]
    ) -> None:
        """Take all that the host before sends, and hand on what the one after does not have."""
        header = bytearray(_HEADER.size)
        for _ in range(sum(len(lane) for lane in bucket.lanes.values())):
            _receive_into(connection, [memoryview(header)])
            number, source, index = _HEADER.unpack(header)
            lane = bucket.lanes.get(source, ())
            if number != bucket.number or index >= len(lane):
                raise ConnectionError(f"it is at bucket {number}, and not at {bucket.number}")
            _receive_into(connection, bucket.views(lane[index]))
            if source != self._after:
                passed.put((source, index))

    def _send(
        self,
        connection: socket.socket,
        bucket: _Bucket,
        own: Sequence[Message],
        onward: int,
        passed: queue.SimpleQueue[_Passed],
    ) -> None:
        """In a thread: send on what has come, and in between what is this host's own."""
        waiting = deque(enumerate(own))
        try:
            while waiting or onward:
                try:
                    came = passed.get(block=not waiting)
                except queue.Empty:
                    index, message = waiting.popleft()
                    source = self.host
                else:
                    if came is None:  # all has come, or nothing more will
                        if onward:
                            return
                        continue
                    source, index = came
                    message = bucket.lanes[source][index]
                    onward -= 1
                header = memoryview(_HEADER.pack(bucket.number, source, index))
                _send_all(connection, [header, *bucket.views(message)])
        except OSError as error:
            self._fail(self._after, error)

    def _fail(self, peer: int, error: OSError) -> None:
        """Remember the first error."""
        if self._error is None:
            silent = isinstance(error, BlockingIOError | TimeoutError)
            what = f"was silent for {self._deadline_s:g} s" if silent else "is gone"
            self._error = RelayError(f"host {peer} {what}, says host {self.host}: {_line(error)}", peer)
            self._error.__cause__ = error
        self._wake()

    def _wake(self) -> None:
        """End whatever waits in a connection."""
        for connection in self._connections or ():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _missing(self, place: Store) -> list[int]:
        """Hosts that have not come; all others if the store cannot say."""
        others = [other for other in self.hosts if other != self.host]
        try:
            # If all have, it is a neighbour.
            return [other for other in others if not place.check([f"host/{other}"])] or [self._before]
        except RuntimeError:
            return others

    def close(self) -> None:
        """Let go of the connections; peers that wait for this host get an error at once."""
        for connection in self._connections or ():
            connection.close()
        self._connections = None


#: Source and number of a message that has come; None: no more will.
_Passed = tuple[int, int] | None


class _Bucket(NamedTuple):
    """What a transfer moves, as this host has it."""

    memory: memoryview
    #: What other hosts have of it.
    lanes: Mapping[int, Sequence[Message]]
    number: int

    def views(self, message: Message) -> list[memoryview]:
        return [self.memory[piece.offset : piece.offset + piece.nbytes] for piece in message.pieces]


def _receive_into(connection: socket.socket, views: list[memoryview]) -> None:
    while views:
        count = connection.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        if not count:
            raise ConnectionError("it closed the connection")
        views = _after_bytes(views, count)


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    while views:
        views = _after_bytes(views, connection.sendmsg(views))


def _after_bytes(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of these views after the first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def _accepted(server: socket.socket, token: bytes, ends: float) -> socket.socket:
    """The connection of the host before; whoever does not know the token is sent away."""
    while True:
        server.settimeout(_left_s(ends))
        connection, _ = server.accept()
        with suppress(OSError):
            connection.settimeout(_left_s(ends))
            if hmac.compare_digest(connection.recv(len(token), socket.MSG_WAITALL), token):
                return connection
        connection.close()


def _left_s(ends: float) -> float:
    """Until then; never nothing, which would be for ever."""
    return max(ends - time.monotonic(), 0.001)


def _address(store: Store, interface: str | None) -> str:
    """The address of an interface, or the one from which the store is reached."""
    if interface is not None:
        kinds = (socket.AF_INET, socket.AF_INET6)
        found = [a.address for a in psutil.net_if_addrs().get(interface, ()) if a.family in kinds]
        if not found:
            raise OSError(f"network interface {interface} has no address")
        return str(found[0])
    if not isinstance(store, TCPStore):
        return "127.0.0.1"
    # Nothing is sent. The host's own name may lead anywhere.
    family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _line(error: Exception) -> str:
    """The first line of an error of torch's, without the place in its source and the advice."""
    line = next(iter(str(error).strip().splitlines()), repr(error))
    return re.sub(r"^\[\S*\] ", "", line).partition(". This is typically")[0]
