"""A host's part in pushes that span hosts: it owns the host's arena and passes buckets on."""

from __future__ import annotations

from torch import Tensor

from k2rl.checkpoint_engine.arena import Arena, HostArena
from k2rl.checkpoint_engine.messages import (
    AGENT,
    Address,
    Channel,
    Commit,
    Held,
    Message,
    Peer,
    Prepare,
    Prepared,
    Transfer,
    TransferError,
    Transferred,
)
from k2rl.checkpoint_engine.pieces import digests_of
from k2rl.checkpoint_engine.plan import NO_PLAN, Bucket
from k2rl.checkpoint_engine.relay import HostRelay
from k2rl.checkpoint_engine.runs import runs


class HostAgent:
    """Keeps its arena and its connections to the other hosts from push to push."""

    def __init__(self, host: int, interface: str | None = None) -> None:
        """
        Args:
            host: this host's number.
            interface: network interface to the other hosts; default: the one that leads to the coordinator.
        """
        self._peer = Peer(AGENT, host)
        self._interface = interface
        self._plan = NO_PLAN
        self._arena = HostArena()
        self._relay: tuple[int, HostRelay] | None = None

    def take_part(self, address: Address, deadline_s: float) -> int:
        """Serve the push that the coordinator at `address` is about to make.

        Returns:
            The version that was committed.

        Raises:
            TransferError: the push failed.
            RelayError: because of the connection to another host.
        """
        with Channel(address, self._peer, deadline_s, self._peer.rank, self._plan.digest) as channel:
            prepare = channel.expect(Prepare)
            plan = self._plan = prepare.plan or self._plan
            if prepare.held is not None and prepare.held.host == self._peer.rank:
                self._give(prepare, prepare.held, channel, deadline_s)
                return prepare.version
            arena, base = self._arena.reserve(plan)
            try:
                channel.send(Prepared(arena.path, base, arena.name))
                self._pass_on(prepare, arena.memory[base : base + plan.arena_bytes], channel, deadline_s)
            except BaseException:
                # Trainer ranks of this push may still be writing there.
                self._arena.abandon()
                raise
            self._arena.commit(plan, prepare.version)
            return prepare.version

    def _give(self, prepare: Prepare, held: Held, channel: Channel, deadline_s: float) -> None:
        """Let others have the version that lies in this host's arena, whoever keeps it open."""
        arena = Arena.open(held.arenas, held.arena_name, writable=False)
        try:
            channel.send(Prepared(arena.path, held.base, arena.name))
            end = held.base + self._plan.arena_bytes
            self._pass_on(prepare, arena.memory[held.base : end], channel, deadline_s)
        finally:
            arena.close()

    def _pass_on(self, prepare: Prepare, places: Tensor, channel: Channel, deadline_s: float) -> None:
        if prepare.held is None:
            self._transfer_all(
                self._connected(prepare, deadline_s), prepare, places, channel, channel.receive()
            )
            return
        # A relay of its own, that leaves the one of the pushes as it is; made once all are known to be there.
        first = channel.receive()
        relay = self._connect(prepare, deadline_s)
        try:
            self._transfer_all(relay, prepare, places, channel, first)
        finally:
            relay.close()

    def _transfer_all(
        self, relay: HostRelay, prepare: Prepare, places: Tensor, channel: Channel, message: Message
    ) -> None:
        while isinstance(message, Transfer):
            bucket = self._plan.buckets[message.bucket]
            memory = places[bucket.offset : bucket.offset + bucket.nbytes]
            self.transfer(relay, memory, bucket, prepare.host_of)
            # The whole version, which others may join at: receivers here check only what they apply.
            came = prepare.held is not None and prepare.held.host != self._peer.rank
            channel.send(
                Transferred(bucket.index, digests_of(bucket, places, self._plan.cell_bytes) if came else {})
            )
            message = channel.receive()
        if not isinstance(message, Commit):
            raise TransferError(f"expected Commit, got {message}")

    def transfer(self, relay: HostRelay, memory: Tensor, bucket: Bucket, host_of: dict[int, int]) -> None:
        """Bring every part of a bucket to every host; see `HostRelay.transfer`."""
        relay.transfer(memory, runs(bucket, host_of), number=bucket.index)

    def _connect(self, prepare: Prepare, deadline_s: float) -> HostRelay:
        return HostRelay(
            self._peer.rank, prepare.hosts, prepare.store, prepare.epoch, deadline_s, self._interface
        )

    def _connected(self, prepare: Prepare, deadline_s: float) -> HostRelay:
        """The relay of this epoch."""
        if self._relay is None or self._relay[0] != prepare.epoch:
            self._disconnect()
            self._relay = (prepare.epoch, self._connect(prepare, deadline_s))
        return self._relay[1]

    def _disconnect(self) -> None:
        if self._relay is not None:
            self._relay[1].close()
            self._relay = None

    def close(self) -> None:
        self._disconnect()
        self._arena.close()
