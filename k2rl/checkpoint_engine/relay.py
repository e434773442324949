"""Bytes from the host that has them to all others, over gloo.

Each source's bytes go down a chain of hosts, in messages of a few mebibytes, and every host passes a message
on as soon as it has it. So every link carries every byte once, all hops are busy at the same time, and with
sources on every host the chains form a ring. gloo's own broadcast is a tree whose root sends everything twice
with three hosts, and more often with more. Three namespaces on two cores, a bucket of 64 MiB at a time: the
chain takes half as long as the tree where links set the limit; where the processor does, both make as many
copies and the chain wakes more often, so that it is 10 to 25 % slower (`benchmarks/weight_hosts.py`).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise

import msgspec
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work

from k2rl.checkpoint_engine.plan import ALIGNMENT, Bucket

#: Bounds of the bytes in a message of one run; see `message_bytes`.
SMALLEST_MESSAGE, LARGEST_MESSAGE = 1 << 20, 8 << 20
#: Runs of fewer bytes than this travel several to a message: copying them twice costs less than a message.
GATHER_BELOW = 1 << 18
#: Most bytes in a message of several runs, which takes memory of its own.
GATHERED_BYTES = 1 << 20
#: How many messages of each chain are awaited ahead of the one that is being passed on.
AHEAD = 8


class RelayError(RuntimeError):
    """A transfer between hosts that did not happen; `host` is the peer it failed with, if that is known.

    That peer may itself have been waiting for another: `transaction.culprits` knows when all have been heard.
    """

    def __init__(self, message: str, host: int | None = None) -> None:
        super().__init__(message)
        self.host = host


class Run(msgspec.Struct, frozen=True):
    """Bytes `offset` to `offset + nbytes` of a bucket, that host `source` has."""

    source: int
    offset: int
    nbytes: int


class Message(msgspec.Struct, frozen=True):
    """Runs that travel together, all of one source."""

    pieces: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def runs(bucket: Bucket, host_of: Mapping[int, int]) -> list[Run]:
    """What each host has of a bucket, in order; `host_of` says on which host an owner is.

    Parts of one host with nothing but padding between them are one run.
    """
    merged: list[Run] = []
    parts = sorted(
        (*block.place(part), host_of[part.owner]) for block in bucket.blocks for part in block.parts
    )
    for offset, nbytes, source in parts:
        last = merged[-1] if merged else None
        if last and last.source == source and offset - (last.offset + last.nbytes) < ALIGNMENT:
            merged[-1] = Run(source, last.offset, offset + nbytes - last.offset)
        elif nbytes:
            merged.append(Run(source, offset, nbytes))
    return merged


def messages(
    runs: Sequence[Run], message_bytes: int = LARGEST_MESSAGE, gathered_bytes: int = GATHERED_BYTES
) -> dict[int, list[Message]]:
    """By source: large runs cut into even messages, small ones put together."""
    found: dict[int, list[Message]] = {}
    small: dict[int, list[Run]] = {}
    waiting: dict[int, int] = {}
    for run in (run for run in runs if run.nbytes):
        source = run.source
        mine = found.setdefault(source, [])
        if run.nbytes >= min(GATHER_BELOW, gathered_bytes):
            count = -(-run.nbytes // message_bytes)
            cuts = [run.offset + run.nbytes * index // count for index in range(count + 1)]
            mine += [Message((Run(source, start, stop - start),)) for start, stop in pairwise(cuts)]
            continue
        if waiting.get(source, 0) + run.nbytes > gathered_bytes:
            mine.append(Message(tuple(small.pop(source))))
            waiting[source] = 0
        small.setdefault(source, []).append(run)
        waiting[source] = waiting.get(source, 0) + run.nbytes
    for source, together in small.items():
        found[source].append(Message(tuple(together)))
    return found


def message_bytes(runs: Sequence[Run], hosts: int) -> int:
    """How large messages should be: after an eighth of the time all hosts of a chain are busy.

    Each message costs gloo 0.1 ms of computing, so they are as large as that allows.
    """
    share = sum(run.nbytes for run in runs) // max(len({run.source for run in runs}), 1)
    return min(max(share // (8 * max(hosts - 2, 1)), SMALLEST_MESSAGE), LARGEST_MESSAGE)


class HostRelay:
    """One host's end of the relay. It has a gloo group of its own: torch's default group is not touched."""

    def __init__(
        self,
        host: int,
        hosts: Sequence[int],
        store: Store | tuple[str, int],
        epoch: int,
        deadline_s: float,
        interface: str | None = None,
    ) -> None:
        """Connect; returns when all have. No other thread of Python's runs meanwhile: gloo keeps the lock.

        Args:
            host: this host's number.
            hosts: the numbers of all that take part, the same everywhere and in the same order.
            store: where they find each other: a store, or address and port of a `TCPStore`.
            epoch: another for every relay that uses the store.
            deadline_s: for connecting, and for each transfer.
            interface: network interface to use. Default: the one that leads to the store.

        Raises:
            RelayError: names the hosts that have not come.
        """
        self.host = host
        self.hosts = tuple(hosts)
        self._deadline_s = deadline_s
        self._ends = 0.0
        self._group: ProcessGroupGloo | None = None
        if len(hosts) == 1:
            return
        limit = timedelta(seconds=deadline_s)
        try:
            if isinstance(store, tuple):
                store = TCPStore(store[0], store[1], is_master=False, timeout=limit, wait_for_workers=False)
            place = PrefixStore(f"relay/{epoch}", store)
            place.set(f"host/{host}", "")
        except RuntimeError as error:
            raise RelayError(
                f"host {host} cannot reach the store of epoch {epoch}: {_line(error)}"
            ) from error
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = limit
        options._threads = 2
        options._devices = [_device(store, interface)]
        try:
            self._group = ProcessGroupGloo(place, self.hosts.index(host), len(hosts), options)
        except RuntimeError as error:
            missing = self._missing(place)
            raise RelayError(
                f"host {host} waited {deadline_s:g} s for hosts {missing} in epoch {epoch}: {_line(error)}",
                missing[0] if missing else None,
            ) from error

    def transfer(
        self, memory: torch.Tensor, runs: Sequence[Run], hosts: Sequence[int] | None = None, number: int = 0
    ) -> None:
        """Copy each run from its source into the same place of every other host's memory.

        One at a time; all its hosts call it with the same arguments but `memory`. It returns when this host
        has all it should get and needs its memory no longer for others; it does not say that others have got
        theirs. Beyond `memory` it holds up to 16 MiB for each source with small runs.

        Args:
            memory: [bytes] uint8, the bucket in this host's arena.
            runs: what to move; they do not overlap.
            hosts: those that shall have the bytes; sources that are not among them only send. Default: all.
            number: the bucket's. Hosts that are at different buckets wait for each other in vain, and nothing
                arrives in the wrong one.

        Raises:
            RelayError: a peer is gone, or nothing came from it within the deadline. The relay is closed: what
                `memory` holds is undefined, and a new relay, of another epoch, must be made.
        """
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise ValueError(
                f"the memory of a bucket is a row of bytes, not {memory.dtype}{list(memory.shape)}"
            )
        if any(run.offset < 0 or run.offset + run.nbytes > len(memory) for run in runs):
            raise ValueError(f"runs reach beyond the {len(memory)} bytes of the bucket")
        takers = self.hosts if hosts is None else tuple(hosts)
        if len(self.hosts) == 1:
            return
        if self._group is None:
            raise RelayError(f"host {self.host}: the relay is closed")
        lanes = []
        for source, queue in messages(runs, message_bytes(runs, len(takers))).items():
            chain = _chain(source, takers)
            if self.host in chain:
                tag = (number * len(self.hosts) + self.hosts.index(source)) % 2**31
                lanes.append(_Lane(self, memory, chain, queue, tag))
        # Nearest source first, as on every host: none then waits for one that waits for it.
        lanes.sort(key=lambda lane: lane.distance)
        try:
            self._run(lanes)
        except BaseException:
            # At once, whoever keeps the error: the peers see that this host has given up.
            for lane in lanes:
                lane.drop()
            self.close()
            raise

    def _missing(self, place: Store) -> list[int]:
        """Hosts that have not come; all others if the store cannot say."""
        try:
            return [other for other in self.hosts if not place.check([f"host/{other}"])]
        except RuntimeError:
            return [other for other in self.hosts if other != self.host]

    def _run(self, lanes: Sequence[_Lane]) -> None:
        self._ends = time.monotonic() + self._deadline_s
        longest = max((len(lane.queue) for lane in lanes), default=0)
        for step in range(longest + 2 * AHEAD):
            for lane in lanes:
                lane.begin(step)
            for lane in lanes:
                lane.pass_on(step - AHEAD)
            for lane in lanes:
                lane.settle(step - 2 * AHEAD)

    def send(self, data: torch.Tensor, peer: int, tag: int) -> Work:
        """Begin to send to a host."""
        return self._begin("send", data, peer, tag)

    def receive(self, data: torch.Tensor, peer: int, tag: int) -> Work:
        """Begin to receive from a host."""
        return self._begin("recv", data, peer, tag)

    def _begin(self, what: str, data: torch.Tensor, peer: int, tag: int) -> Work:
        try:
            work: Work = getattr(self._group, what)([data], self.hosts.index(peer), tag)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        return work

    def wait(self, work: Work, peer: int) -> None:
        """Wait for what was begun with a host, until the transfer's deadline at most."""
        left = max(self._ends - time.monotonic(), 0.001)  # zero would be for ever
        try:
            done = work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        finally:
            del work  # it holds the connection, and the error's traceback would hold it
        if not done:
            raise self._lost(peer, RuntimeError("broken off"))

    def _lost(self, peer: int, error: RuntimeError) -> RelayError:
        line = _line(error)
        what = f"was silent for {self._deadline_s:g} s" if line.startswith("Timed out") else "is gone"
        return RelayError(f"host {peer} {what}, says host {self.host}: {line}", peer)

    def close(self) -> None:
        """Let go of the connections; peers that wait for this host get an error at once."""
        self._group = None


class _Lane:
    """One source's chain, as one host of it sees it: from whom a message comes, to whom it goes on."""

    def __init__(
        self, relay: HostRelay, memory: torch.Tensor, chain: Sequence[int], queue: Sequence[Message], tag: int
    ) -> None:
        self.queue = queue
        self.distance = chain.index(relay.host)
        self._relay = relay
        self._tag = tag
        self._memory = memory
        self._view = memory.numpy().data
        self._before = chain[self.distance - 1] if self.distance else None
        self._after = chain[self.distance + 1] if self.distance + 1 < len(chain) else None
        self._data: dict[int, torch.Tensor] = {}
        self._work: dict[int, Work] = {}

    def begin(self, index: int) -> None:
        """Send a message, if it is this host's own, or get ready for it."""
        if index >= len(self.queue):
            return
        message = self.queue[index]
        first = message.pieces[0]
        if len(message.pieces) == 1:
            data = self._memory[first.offset : first.offset + first.nbytes]
        else:
            data = torch.empty(message.nbytes, dtype=torch.uint8)
        self._data[index] = data
        if self._before is not None:
            self._work[index] = self._relay.receive(data, self._before, self._tag)
            return
        if len(message.pieces) > 1:
            self._copy(message, data, gather=True)
        self._send(index)

    def pass_on(self, index: int) -> None:
        """Wait for a message that is not this host's own, and send it on before anything else."""
        if self._before is None or not 0 <= index < len(self.queue):
            return
        self._relay.wait(self._work.pop(index), self._before)
        self._send(index)
        message = self.queue[index]
        if len(message.pieces) > 1:
            self._copy(message, self._data[index], gather=False)

    def settle(self, index: int) -> None:
        """Wait until a message's memory is needed no longer."""
        if not 0 <= index < len(self.queue):
            return
        if self._after is not None:
            self._relay.wait(self._work.pop(index), self._after)
        del self._data[index]

    def drop(self) -> None:
        """Let go of everything that is under way."""
        self._work.clear()
        self._data.clear()

    def _send(self, index: int) -> None:
        if self._after is not None:
            self._work[index] = self._relay.send(self._data[index], self._after, self._tag)

    def _copy(self, message: Message, data: torch.Tensor, *, gather: bool) -> None:
        packed, start = data.numpy().data, 0
        for piece in message.pieces:
            here = slice(piece.offset, piece.offset + piece.nbytes)
            there = slice(start, start + piece.nbytes)
            if gather:
                packed[there] = self._view[here]
            else:
                self._view[here] = packed[there]
            start += piece.nbytes


def _chain(source: int, takers: Sequence[int]) -> tuple[int, ...]:
    """The source, then those after it in a ring; so with sources everywhere all links carry the same."""
    others = sorted(taker for taker in takers if taker != source)
    return (source, *(t for t in others if t > source), *(t for t in others if t < source))


def _device(store: Store, interface: str | None) -> ProcessGroupGloo.Device:
    if interface is not None:
        return ProcessGroupGloo.create_device(interface=interface)
    if not isinstance(store, TCPStore):
        return ProcessGroupGloo.create_default_device()
    # The address from which the store is reached; nothing is sent. The host's name may lead anywhere.
    family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return ProcessGroupGloo.create_device(hostname=probe.getsockname()[0])


def _line(error: Exception) -> str:
    """The first line of an error of torch's, without the place in its source and the advice."""
    line = next(iter(str(error).strip().splitlines()), repr(error))
    return re.sub(r"^\[\S*\] ", "", line).partition(". This is typically")[0]
