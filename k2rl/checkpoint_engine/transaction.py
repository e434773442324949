"""One push as a state machine: events in, messages out. Pure: no sockets, no clocks, no torch.

begin -> (fill -> [transfer] -> deliver -> apply)* -> finish -> vote -> commit
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import TypeVar

import msgspec
import xxhash

from k2rl.checkpoint_engine.messages import (
    AGENT,
    RECEIVER,
    SENDER,
    Abort,
    Applied,
    Begin,
    Commit,
    Committed,
    Deliver,
    Failed,
    Filled,
    Finish,
    Finished,
    Free,
    Message,
    Peer,
    Prepare,
    Prepared,
    Transfer,
    TransferError,
    Transferred,
)
from k2rl.checkpoint_engine.plan import Bucket, Plan

B = TypeVar("B", Begin, Prepare)
Outgoing = tuple[Peer, Message]
#: By bucket and owner.
Digests = dict[int, dict[int, str]]


class State(Enum):
    STAGING = "staging"
    APPLYING = "applying"
    #: All have voted for it: from here on the version stands, whoever is lost.
    COMMITTING = "committing"
    DONE = "done"
    FAILED = "failed"


class PushError(TransferError):
    """A push failed. `culprit` is the participant that died, hangs or reported an error, if it is one."""

    def __init__(self, reason: str, culprit: Peer | None = None) -> None:
        super().__init__(reason)
        self.culprit = culprit


class Transaction:
    """Who has done what in a push, and what comes next."""

    def __init__(
        self,
        plan: Plan,
        begins: Mapping[int, Begin],
        receivers: Mapping[int, int],
        prepare: Prepare | None = None,
        staged: Digests | None = None,
    ) -> None:
        """
        Args:
            plan: of this push.
            begins: the first message to participants, by host; of a host with an agent, what its agent's
                `Prepared` does not say yet.
            receivers: host of each receiver.
            prepare: the first message to the agents of its hosts, which transfer buckets; none on a single
                host.
            staged: digests of a version that lies in the arenas already: nothing is filled or transferred.
        """
        self.plan = plan
        self.state = State.STAGING
        self.error: PushError | None = None
        #: Receivers that were lost after the decision to commit.
        self.lost: list[Peer] = []
        #: Where a receiver's own mapping of the arena can be opened.
        self.mappings: dict[int, str] = {}
        self.digests: Digests = staged or {bucket.index: {} for bucket in plan.buckets}
        #: By host; complete once all agents are prepared.
        self.begins = dict(begins)
        self._prepare = prepare
        agents = prepare.hosts if prepare else ()
        #: Participants that wait for their host's agent.
        self._lobby: list[tuple[Peer, int, str]] = []
        #: Buckets in the order in which all agents transfer them.
        self._requested: list[int] = []
        self._hosts = {Peer(RECEIVER, rank): host for rank, host in receivers.items()}
        self._agents = {Peer(AGENT, host) for host in agents}
        self._staged = staged is not None
        # What each participant still has to do, in the order in which it should.
        self._fill: dict[Peer, list[int]] = {}
        self._transfer: dict[Peer, set[int]] = {agent: set() for agent in self._agents}
        self._apply: dict[Peer, set[int]] = {receiver: set() for receiver in self._hosts}
        self._delivered: dict[Peer, set[int]] = {receiver: set() for receiver in self._hosts}
        self._finishing: set[Peer] = set()
        self._voted: set[Peer] = set()
        self._committing: set[Peer] = set()
        self._transferred: dict[int, set[int]] = {bucket.index: set() for bucket in plan.buckets}
        self._present: set[Peer] = set()
        self._preparing: set[Peer] = set()
        #: Agents that failed with another host: which, and how.
        self.blamed: dict[Peer, tuple[int, str]] = {}
        self._successors = {bucket.after: bucket for bucket in plan.buckets if bucket.after >= 0}
        if not self._staged:
            for bucket in plan.buckets:
                for owner in bucket.owners:
                    self._fill.setdefault(Peer(SENDER, owner), []).append(bucket.index)
        for bucket in plan.buckets:
            for rank in bucket.receivers:
                if Peer(RECEIVER, rank) in self._apply:
                    self._apply[Peer(RECEIVER, rank)].add(bucket.index)

    @property
    def stagers(self) -> set[Peer]:
        """Who takes part before anything is applied: senders and host agents."""
        return set(self._fill) | (set() if self._staged else self._agents)

    @property
    def receivers(self) -> set[Peer]:
        return set(self._hosts)

    @property
    def participants(self) -> set[Peer]:
        return self.stagers | self.receivers

    @property
    def unfilled(self) -> set[Peer]:
        """Senders that were told to begin and have not said that they are done."""
        return {peer for peer, todo in self._fill.items() if todo and peer in self._present}

    @property
    def staged(self) -> bool:
        """Whether every bucket lies on every host."""
        return self._staged or all(self._on_every_host(bucket) for bucket in self.plan.buckets)

    def missing(self) -> dict[Peer, str]:
        """Whose answer is awaited, and what it is; empty while it is our turn."""
        if self.state in (State.DONE, State.FAILED):
            return {}
        owed = {}
        for peer in self.stagers | (self.receivers if self.state is not State.STAGING else set()):
            if peer not in self._present:
                owed[peer] = "to connect"
            elif (todo := self._owes(peer)) and peer not in self.blamed:
                owed[peer] = todo
        return owed

    def _owes(self, peer: Peer) -> str:
        if any(peer == waiting for waiting, _, _ in self._lobby):
            return ""
        if peer.role == SENDER:
            free = [index for index in self._fill[peer] if self._may_be_written(self.plan.buckets[index])]
            return f"to fill bucket {free[0]}" if free else ""
        if peer.role == AGENT:
            if peer in self._preparing:
                return "to make room and meet the other hosts"
            return f"to transfer bucket {self._next_transfer(peer)}" if self._transfer[peer] else ""
        if peer in self._committing:
            return "to commit"
        if peer in self._finishing:
            return "to finish loading"
        under_way = self._delivered[peer] & self._apply[peer]
        return f"to apply bucket {min(under_way)}" if under_way else ""

    def hello(self, peer: Peer, host: int, plan: str = "") -> Iterator[Outgoing]:
        """A participant has connected; `plan` is the digest of the plan that it knows."""
        if peer not in self.participants or peer in self._present:
            yield peer, Abort(f"{peer} is no participant of this push, or takes part twice")
            return
        self._present.add(peer)
        if host not in self.begins:
            yield from self.fail(
                f"{peer} says that it is on host {host}, of which this push knows nothing", peer
            )
            return
        if peer.role == AGENT:
            assert self._prepare is not None
            yield peer, _without_known_plan(self._prepare, plan)
            self._preparing.add(peer)
            for index in self._requested:
                yield from self._request_transfer(index, peer)
        elif Peer(AGENT, host) in self._preparing or Peer(AGENT, host) in self._agents - self._present:
            self._lobby.append((peer, host, plan))
        else:
            yield from self._admit(peer, host, plan)

    def _admit(self, peer: Peer, host: int, plan: str) -> Iterator[Outgoing]:
        yield peer, _without_known_plan(self.begins[host], plan)
        if self.state is State.APPLYING and peer.role == RECEIVER:
            yield from self._deliver(peer)

    def _prepared(self, peer: Peer, message: Prepared) -> Iterator[Outgoing]:
        """A host has room: those who wait for it may begin."""
        self._preparing.discard(peer)
        begin = self.begins[peer.rank]
        self.begins[peer.rank] = msgspec.structs.replace(begin, arenas=(message.arena,), base=message.base)
        waiting = [entry for entry in self._lobby if entry[1] == peer.rank]
        self._lobby = [entry for entry in self._lobby if entry[1] != peer.rank]
        for entry in waiting:
            yield from self._admit(*entry)

    def open_delivery(self) -> Iterator[Outgoing]:
        """Receivers may be given buckets from now on, unless the push has failed already."""
        if self.state is not State.STAGING:
            return
        self.state = State.APPLYING
        if not self._hosts:
            # The version is kept for those who join.
            yield from self._commit()
        for peer in self._hosts:
            if peer in self._present:
                yield from self._deliver(peer)

    def receive(self, peer: Peer, message: Message) -> Iterator[Outgoing]:
        """A participant's message; may end the push."""
        if self.state is State.FAILED or peer not in self.participants:
            return
        if isinstance(message, Failed):
            if peer.role == AGENT and message.blamed_host is not None:
                # The other one may have been waiting itself: all who can shall say whom they waited for.
                self.blamed[peer] = (message.blamed_host, message.reason)
                if self.blamed.keys() >= self._agents:
                    yield from self.conclude()
                return
            yield from self.fail(f"{peer} failed: {message.reason}", peer)
        elif isinstance(message, Filled) and self._may_fill(peer, message.bucket):
            yield from self._filled(peer, message)
        elif isinstance(message, Prepared) and peer in self._preparing:
            yield from self._prepared(peer, message)
        elif isinstance(message, Transferred) and message.bucket in self._transfer.get(peer, ()):
            self._transfer[peer].discard(message.bucket)
            self._transferred[message.bucket].add(peer.rank)
            yield from self._deliver_to_all()
        elif isinstance(message, Applied) and message.bucket in self._delivered.get(peer, ()):
            yield from self._applied(peer, message)
        elif isinstance(message, Finished) and peer in self._finishing:
            yield from self._finished(peer, message)
        elif isinstance(message, Committed) and peer in self._committing:
            self._committing.discard(peer)
            self._close()
        else:
            yield from self.fail(f"{peer} said {type(message).__name__} when it was not its turn", peer)

    def gone(self, peer: Peer, why: str) -> Iterator[Outgoing]:
        """A participant's connection ended, or it has been silent for too long."""
        if peer not in self.participants:
            return
        if self.state is State.COMMITTING:
            if peer in self._committing:
                self._committing.discard(peer)
                self.lost.append(peer)
                self._close()
        elif peer in self.blamed:
            return  # it has said why it leaves
        elif self.state in (State.STAGING, State.APPLYING):
            # A sender that has filled everything may leave.
            if peer.role == SENDER and peer in self._present and not self._fill.get(peer):
                return
            yield from self.fail(f"{peer} {why}", peer)

    def conclude(self) -> Iterator[Outgoing]:
        """End the push because agents have failed with each other; names those at fault."""
        hosts = culprits({agent.rank: host for agent, (host, _) in self.blamed.items()})
        peer = Peer(AGENT, min(hosts))
        reasons = "; ".join(reason for host, reason in self.blamed.values() if host in hosts)
        yield from self.fail(f"{peer} is gone, hangs or cannot be reached: {reasons}", peer)

    def fail(self, reason: str, culprit: Peer | None = None) -> Iterator[Outgoing]:
        """End the push; everybody is told why."""
        if self.state in (State.STAGING, State.APPLYING):
            self.state = State.FAILED
            self.error = PushError(reason, culprit)
            for peer in self._present:
                yield peer, Abort(reason)

    def _filled(self, peer: Peer, message: Filled) -> Iterator[Outgoing]:
        bucket = self.plan.buckets[message.bucket]
        self._fill[peer].remove(message.bucket)
        self.digests[bucket.index][peer.rank] = message.digest
        if not self._is_filled(bucket):
            return
        self._requested.append(bucket.index)
        for agent in sorted(self._agents & self._present):
            yield from self._request_transfer(bucket.index, agent)
        if not self._agents:
            yield from self._deliver_to_all()

    def _request_transfer(self, index: int, agent: Peer) -> Iterator[Outgoing]:
        self._transfer[agent].add(index)
        yield agent, Transfer(index)

    def _next_transfer(self, agent: Peer) -> int:
        return next(index for index in self._requested if index in self._transfer[agent])

    def _deliver_to_all(self) -> Iterator[Outgoing]:
        if self.state is State.APPLYING:
            for peer in self._hosts:
                if peer in self._present:
                    yield from self._deliver(peer)

    def _deliver(self, peer: Peer) -> Iterator[Outgoing]:
        for index in sorted(self._apply[peer] - self._delivered[peer]):
            if self._lies_on(self.plan.buckets[index], self._hosts[peer]):
                self._delivered[peer].add(index)
                yield peer, Deliver(index, self.digests[index])
        if not self._apply[peer] and peer not in self._finishing | self._voted:
            self._finishing.add(peer)
            yield peer, Finish()

    def _applied(self, peer: Peer, message: Applied) -> Iterator[Outgoing]:
        if message.digests != self.digests[message.bucket]:
            yield from self.fail(
                f"{peer} applied other bytes of bucket {message.bucket} than were sent", peer
            )
            return
        self._apply[peer].discard(message.bucket)
        if all(message.bucket not in todo for todo in self._apply.values()):
            successor = self._successors.get(message.bucket)
            for owner in successor.owners if successor else ():
                yield Peer(SENDER, owner), Free(message.bucket)
        if not self._apply[peer]:
            self._finishing.add(peer)
            yield peer, Finish()

    def _finished(self, peer: Peer, message: Finished) -> Iterator[Outgoing]:
        if message.digest != self.version_digest(peer.rank):
            yield from self.fail(f"{peer} has other weights in place than were sent", peer)
            return
        self._finishing.discard(peer)
        self._voted.add(peer)
        self.mappings[peer.rank] = message.arena
        if self._voted == self.receivers:
            yield from self._commit()

    def _commit(self) -> Iterator[Outgoing]:
        self.state = State.COMMITTING
        self._committing = set(self.receivers)
        for peer in sorted(self._present):
            yield peer, Commit()
        self._close()

    def version_digest(self, receiver: int) -> str:
        """Of everything that a receiver applies, in the order of the buckets."""
        return version_digest(
            self.digests[bucket.index] for bucket in self.plan.buckets if receiver in bucket.receivers
        )

    def _close(self) -> None:
        if not self._committing:
            self.state = State.DONE

    def _is_filled(self, bucket: Bucket) -> bool:
        return len(self.digests[bucket.index]) == len(bucket.owners)

    def _may_fill(self, peer: Peer, index: int) -> bool:
        return index in self._fill.get(peer, ()) and self._may_be_written(self.plan.buckets[index])

    def _may_be_written(self, bucket: Bucket) -> bool:
        return bucket.after < 0 or all(bucket.after not in todo for todo in self._apply.values())

    def _lies_on(self, bucket: Bucket, host: int) -> bool:
        if self._staged or not self._agents:
            return self._is_filled(bucket)
        return host in self._transferred[bucket.index]

    def _on_every_host(self, bucket: Bucket) -> bool:
        hosts = {agent.rank for agent in self._agents}
        return self._is_filled(bucket) and self._transferred[bucket.index] == hosts


def _without_known_plan(message: B, known: str) -> B:
    return msgspec.structs.replace(message, plan=None) if known == message.plan_digest else message


def culprits(blamed: Mapping[int, int]) -> set[int]:
    """Who is at fault, when each host blames the one it failed with: those that are blamed and blame nobody.

    If there is none, the connections are at fault, and all that are blamed are named.
    """
    accused = set(blamed.values())
    return accused - blamed.keys() or accused


def version_digest(buckets: Iterable[Mapping[int, str]]) -> str:
    """One digest of the digests of buckets and, in each, of owners."""
    digest = xxhash.xxh3_128()
    for owners in buckets:
        for owner in sorted(owners):
            digest.update(f"{owner}:{owners[owner]};".encode())
    return digest.hexdigest()
