"""A host's part in pushes that span hosts: it owns the host's arena and passes buckets on."""

from __future__ import annotations

from torch import Tensor

from k2rl.checkpoint_engine.arena import HostArena
from k2rl.checkpoint_engine.messages import (
    AGENT,
    Address,
    Channel,
    Commit,
    Peer,
    Prepare,
    Prepared,
    Transfer,
    TransferError,
    Transferred,
)
from k2rl.checkpoint_engine.plan import NO_PLAN, Bucket
from k2rl.checkpoint_engine.relay import HostRelay, runs


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
            arena, base = self._arena.reserve(plan)
            try:
                channel.send(Prepared(arena.path, base))
                self._pass_on(prepare, arena.memory[base : base + plan.arena_bytes], channel, deadline_s)
            except BaseException:
                # Trainer ranks of this push may still be writing there.
                self._arena.abandon()
                raise
            self._arena.commit(plan, prepare.version)
            return prepare.version

    def _pass_on(self, prepare: Prepare, places: Tensor, channel: Channel, deadline_s: float) -> None:
        relay = self._connected(prepare, deadline_s)
        while isinstance(message := channel.receive(), Transfer):
            bucket = self._plan.buckets[message.bucket]
            memory = places[bucket.offset : bucket.offset + bucket.nbytes]
            self.transfer(relay, memory, bucket, prepare.host_of)
            channel.send(Transferred(bucket.index))
        if not isinstance(message, Commit):
            raise TransferError(f"expected Commit, got {message}")

    def transfer(self, relay: HostRelay, memory: Tensor, bucket: Bucket, host_of: dict[int, int]) -> None:
        """Bring every part of a bucket to every host; see `HostRelay.transfer`."""
        relay.transfer(memory, runs(bucket, host_of), number=bucket.index)

    def _connected(self, prepare: Prepare, deadline_s: float) -> HostRelay:
        """The relay of this epoch; the last push's as long as nothing went wrong."""
        if self._relay is None or self._relay[0] != prepare.epoch:
            self._disconnect()
            relay = HostRelay(
                self._peer.rank, prepare.hosts, prepare.store, prepare.epoch, deadline_s, self._interface
            )
            self._relay = (prepare.epoch, relay)
        return self._relay[1]

    def _disconnect(self) -> None:
        if self._relay is not None:
            self._relay[1].close()
            self._relay = None

    def close(self) -> None:
        self._disconnect()
        self._arena.close()
