"""One push as a state machine: events in, messages out. Pure: no sockets, no clocks, no torch.

begin -> (fill -> [transfer] -> deliver -> apply)* -> finish -> vote -> commit
"""

from __future__ import annotations

from collections import deque
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
from k2rl.checkpoint_engine.plan import Plan

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
    """A push failed.

    `culprit` is the participant that died, hangs or reported an error, if it is one; `arena_lost`: because
    there is no way to its host's arena any more.
    """

    def __init__(
        self, reason: str, culprit: Peer | None = None, *, refused: bool = False, arena_lost: bool = False
    ) -> None:
        super().__init__(reason)
        self.culprit = culprit
        self.refused = refused
        self.arena_lost = arena_lost


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
            staged: digests of a version that is held already: nothing is filled. It lies in the arenas of all
                hosts without an agent here, and goes from `prepare.held` to those of the agents.
        """
        self.plan = plan
        self.state = State.STAGING
        self.error: PushError | None = None
        #: Receivers that were lost after the decision to commit.
        self.lost: list[Peer] = []
        #: Where a receiver's own mapping of the arena can be opened.
        self.mappings: dict[int, str] = {}
        #: Of a delta: those of whole buckets, by the first byte of the bucket, and owner.
        self.wholes: Digests = {}
        #: What some receiver takes whole and together or not at all.
        self.together: set[tuple[str, ...]] = set()
        self.digests: Digests = staged or {bucket.index: {} for bucket in plan.buckets}
        #: By host; complete once all agents are prepared.
        self.begins = dict(begins)
        self._prepare = prepare
        #: The agent that has everything already.
        self._source = Peer(AGENT, prepare.held.host) if prepare and prepare.held else None
        agents = prepare.hosts if prepare else ()
        #: Participants that wait for their host's agent: host, and the plan that they know.
        self._lobby: dict[Peer, tuple[int, str]] = {}
        self._hosts = {Peer(RECEIVER, rank): host for rank, host in receivers.items()}
        self._agents = {Peer(AGENT, host) for host in agents}
        # Everybody works in a known order, so a message costs the same however many buckets there are.
        #: Buckets that each sender writes into, and how many of them it has filled.
        self._fills: dict[Peer, list[int]] = {}
        self._filled: dict[Peer, int] = {}
        #: Buckets that are filled, in the order in which agents transfer them, and the place of each in it.
        self._ready: list[int] = []
        self._ready_at: dict[int, int] = {}
        #: How many of those each agent has transferred.
        self._transferred: dict[Peer, int] = dict.fromkeys(self._agents, 0)
        #: Buckets that each receiver applies: all, those not yet delivered, and those it is to apply next.
        self._reads: dict[Peer, list[int]] = {receiver: [] for receiver in self._hosts}
        self._undelivered: dict[Peer, set[int]] = {}
        self._delivered: dict[Peer, deque[int]] = {receiver: deque() for receiver in self._hosts}
        #: By bucket, how many receivers have not applied it.
        self._readers: dict[int, int] = {bucket.index: len(bucket.receivers) for bucket in plan.buckets}
        self._finishing: set[Peer] = set()
        self._voted: set[Peer] = set()
        self._committing: set[Peer] = set()
        self._present: set[Peer] = set()
        self._preparing: set[Peer] = set()
        #: Agents that failed with another host: which, and how.
        self.blamed: dict[Peer, tuple[int, str]] = {}
        self._successors = {bucket.after: bucket for bucket in plan.buckets if bucket.after >= 0}
        for bucket in plan.buckets:
            for rank in bucket.receivers:
                self._reads[Peer(RECEIVER, rank)].append(bucket.index)
            if staged is not None:
                if not self._agents:
                    self._is_ready(bucket.index)
                continue
            for owner in bucket.owners:
                self._fills.setdefault(Peer(SENDER, owner), []).append(bucket.index)
        self._filled = dict.fromkeys(self._fills, 0)
        self._undelivered = {receiver: set(buckets) for receiver, buckets in self._reads.items()}

    @property
    def stagers(self) -> set[Peer]:
        """Who takes part before anything is applied: senders and host agents."""
        return set(self._fills) | self._agents

    @property
    def receivers(self) -> set[Peer]:
        return set(self._hosts)

    @property
    def participants(self) -> set[Peer]:
        return self.stagers | self.receivers

    @property
    def unfilled(self) -> set[Peer]:
        """Senders that were told to begin and have not said that they are done."""
        return {peer for peer in self._fills if self._next_fill(peer) is not None and peer in self._present}

    @property
    def staged(self) -> bool:
        """Whether every bucket lies on every host."""
        everything = len(self.plan.buckets)
        return len(self._ready) == everything and all(n == everything for n in self._transferred.values())

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
        if peer in self._lobby:
            return ""
        if peer.role == SENDER:
            index = self._next_fill(peer)
            return f"to fill bucket {index}" if index is not None and self._may_be_written(index) else ""
        if peer.role == AGENT:
            if peer in self._preparing:
                return "to make room and meet the other hosts"
            index = self._next_transfer(peer)
            return f"to transfer bucket {index}" if index is not None else ""
        if peer in self._committing:
            return "to commit"
        if peer in self._finishing:
            return "to finish loading"
        index = self._next_to_apply(peer)
        return f"to apply bucket {index}" if index is not None else ""

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
            for index in self._ready:
                yield peer, Transfer(index)
        elif Peer(AGENT, host) in self._preparing or Peer(AGENT, host) in self._agents - self._present:
            self._lobby[peer] = (host, plan)
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
        self.begins[peer.rank] = msgspec.structs.replace(
            begin, arenas=(message.arena,), base=message.base, arena_name=message.arena_name
        )
        for waiting, (host, plan) in list(self._lobby.items()):
            if host == peer.rank:
                del self._lobby[waiting]
                yield from self._admit(waiting, host, plan)
        if self._source and self._agents <= self._present and not self._preparing:
            # Not before: whoever meets a host that will not come waits for it, and cannot be used meanwhile.
            for bucket in self.plan.buckets:
                self._is_ready(bucket.index)
                for agent in sorted(self._agents):
                    yield agent, Transfer(bucket.index)

    def open_delivery(self) -> Iterator[Outgoing]:
        """Receivers may be given buckets from now on, unless the push has failed already."""
        if self.state is not State.STAGING:
            return
        self.state = State.APPLYING
        if not self._hosts:
            # The version is kept for those who join.
            yield from self._commit()
        for peer in self._hosts:
            if peer in self._present and peer not in self._lobby:
                yield from self._deliver(peer)

    def receive(self, peer: Peer, message: Message) -> Iterator[Outgoing]:
        """A participant's message; may end the push."""
        if self.state is State.FAILED or peer not in self.participants:
            return
        if isinstance(message, Failed) and self._is_needed_no_more(peer):
            return
        if isinstance(message, Failed):
            if peer.role == AGENT and message.blamed_host is not None:
                # The other one may have been waiting itself: all who can shall say whom they waited for.
                self.blamed[peer] = (message.blamed_host, message.reason)
                if self.blamed.keys() >= self._agents:
                    yield from self.conclude()
                return
            yield from self.fail(
                f"{peer} failed: {message.reason}",
                peer,
                refused=message.refused,
                arena_lost=message.arena_lost,
            )
        elif isinstance(message, Filled) and self._may_fill(peer, message.bucket):
            yield from self._fill(peer, message)
        elif isinstance(message, Prepared) and peer in self._preparing:
            yield from self._prepared(peer, message)
        elif isinstance(message, Transferred) and message.bucket == self._next_transfer(peer):
            yield from self._pass_on(peer, message)
        elif isinstance(message, Applied) and message.bucket == self._next_to_apply(peer):
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
            if peer.role == SENDER and peer in self._present and self._next_fill(peer) is None:
                return
            if self._is_needed_no_more(peer):
                return
            yield from self.fail(f"{peer} {why}", peer)

    def conclude(self) -> Iterator[Outgoing]:
        """End the push because agents have failed with each other; names those at fault."""
        hosts = culprits({agent.rank: host for agent, (host, _) in self.blamed.items()})
        # If it can be either's fault: another source can be found.
        source = self._source
        peer = source if source and source.rank in hosts else Peer(AGENT, min(hosts))
        reasons = "; ".join(reason for host, reason in self.blamed.values() if host in hosts)
        yield from self.fail(f"{peer} is gone, hangs or cannot be reached: {reasons}", peer)

    def fail(
        self, reason: str, culprit: Peer | None = None, *, refused: bool = False, arena_lost: bool = False
    ) -> Iterator[Outgoing]:
        """End the push; everybody is told why."""
        if self.state in (State.STAGING, State.APPLYING):
            self.state = State.FAILED
            self.error = PushError(reason, culprit, refused=refused, arena_lost=arena_lost)
            for peer in self._present:
                yield peer, Abort(reason)

    def _fill(self, peer: Peer, message: Filled) -> Iterator[Outgoing]:
        bucket = self.plan.buckets[message.bucket]
        self._filled[peer] += 1
        self.digests[bucket.index][peer.rank] = message.digest
        if message.whole:
            self.wholes.setdefault(bucket.offset, {})[peer.rank] = message.whole
        if len(self.digests[bucket.index]) == len(bucket.owners):
            self._is_ready(bucket.index)
            for agent in sorted(self._agents & self._present):
                yield agent, Transfer(bucket.index)
            if not self._agents:
                yield from self._deliver_bucket(bucket.index)

    def _pass_on(self, agent: Peer, message: Transferred) -> Iterator[Outgoing]:
        source = self._source
        if source and agent != source and message.digests != self.digests[message.bucket]:
            yield from self.fail(
                f"bucket {message.bucket} arrived corrupted on host {agent.rank}: "
                f"not what was committed and host {source.rank} should hold",
                source,
            )
            return
        self._transferred[agent] += 1
        yield from self._deliver_bucket(message.bucket, agent.rank)

    def _is_ready(self, index: int) -> None:
        self._ready_at[index] = len(self._ready)
        self._ready.append(index)

    def _deliver_bucket(self, index: int, host: int | None = None) -> Iterator[Outgoing]:
        """Give a bucket to its receivers, on one host or on all, that are there."""
        if self.state is not State.APPLYING:
            return
        for rank in self.plan.buckets[index].receivers:
            peer = Peer(RECEIVER, rank)
            if peer in self._present and host in (None, self._hosts[peer]):
                yield from self._deliver(peer, [index])

    def _deliver(self, peer: Peer, buckets: Iterable[int] | None = None) -> Iterator[Outgoing]:
        """Give a receiver what lies on its host of these buckets; default: of all that it has not got."""
        for index in sorted(self._undelivered[peer]) if buckets is None else buckets:
            if self._lies_on(index, self._hosts[peer]):
                self._undelivered[peer].remove(index)
                self._delivered[peer].append(index)
                yield peer, Deliver(index, self.digests[index])
        if self._has_all(peer) and peer not in self._finishing | self._voted:
            self._finishing.add(peer)
            yield peer, Finish()

    def _has_all(self, peer: Peer) -> bool:
        return not self._undelivered[peer] and not self._delivered[peer]

    def _applied(self, peer: Peer, message: Applied) -> Iterator[Outgoing]:
        if message.digests != self.digests[message.bucket]:
            yield from self.fail(
                f"{peer} applied other bytes of bucket {message.bucket} than were sent", peer
            )
            return
        self._delivered[peer].popleft()
        self._readers[message.bucket] -= 1
        if not self._readers[message.bucket]:
            successor = self._successors.get(message.bucket)
            for owner in successor.owners if successor else ():
                yield Peer(SENDER, owner), Free(message.bucket)
        if self._has_all(peer):
            self._finishing.add(peer)
            yield peer, Finish()

    def _finished(self, peer: Peer, message: Finished) -> Iterator[Outgoing]:
        if message.digest != self.version_digest(peer.rank):
            yield from self.fail(f"{peer} has other weights in place than were sent", peer)
            return
        self._finishing.discard(peer)
        self._voted.add(peer)
        self.mappings[peer.rank] = message.arena
        self.together.update(message.together)
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
        return version_digest(self.digests[index] for index in self._reads[Peer(RECEIVER, receiver)])

    def _close(self) -> None:
        if not self._committing:
            self.state = State.DONE

    def _is_needed_no_more(self, peer: Peer) -> bool:
        """Whether it is the source of a join, and all have everything from it."""
        return peer == self._source and self.state is State.APPLYING

    def _next_fill(self, peer: Peer) -> int | None:
        """The bucket that a sender fills next, once its place is free."""
        todo, done = self._fills.get(peer, ()), self._filled.get(peer, 0)
        return todo[done] if done < len(todo) else None

    def _next_transfer(self, agent: Peer) -> int | None:
        done = self._transferred.get(agent, len(self._ready))
        return self._ready[done] if done < len(self._ready) else None

    def _next_to_apply(self, peer: Peer) -> int | None:
        delivered = self._delivered.get(peer)
        return delivered[0] if delivered else None

    def _may_fill(self, peer: Peer, index: int) -> bool:
        return index == self._next_fill(peer) and self._may_be_written(index)

    def _may_be_written(self, index: int) -> bool:
        after = self.plan.buckets[index].after
        return after < 0 or not self._readers[after]

    def _lies_on(self, index: int, host: int) -> bool:
        """Whether receivers on a host can read a bucket; without an agent, as soon as it is filled."""
        done = self._transferred.get(Peer(AGENT, host), len(self._ready))
        return index in self._ready_at and self._ready_at[index] < done


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
