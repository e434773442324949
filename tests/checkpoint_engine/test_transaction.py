"""A push ends, whatever the order of events: done with all delivered once, or failed with a culprit."""

from __future__ import annotations

import random
from collections import defaultdict, deque

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec
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
    Held,
    Message,
    Peer,
    Prepare,
    Prepared,
    Transfer,
    Transferred,
)
from k2rl.checkpoint_engine.plan import Plan, plan_push
from k2rl.checkpoint_engine.transaction import State, Transaction, version_digest

#: Ways in which a participant can go wrong.
FAULTS = ("dies", "fails", "lies", "out of turn")


@st.composite
def plans(draw: st.DrawFn, slots: tuple[int, ...] = (0, 2, 3)) -> Plan:
    """Buckets of several owners, a ring or not, for all receivers or for some."""
    rows = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    owners = draw(st.integers(1, 3))
    specs = tuple(TensorSpec(f"t{i}", "float32", (n, 40)) for i, n in enumerate(rows))
    shards = tuple(
        Shard(i, owner, n * owner // owners, n * (owner + 1) // owners)
        for i, n in enumerate(rows)
        for owner in range(owners)
    )
    receivers = tuple(range(draw(st.integers(0, 3))))
    needs = {
        receiver: {spec.name: [((0, spec.rows), (0, 40))] for spec in specs if draw(st.booleans())}
        for receiver in receivers
    }
    return plan_push(
        Manifest(specs, shards),
        receivers,
        bucket_bytes=1024,
        slots=draw(st.sampled_from(slots)),
        needs=needs if draw(st.booleans()) else None,
    )


def prepare_for(plan: Plan, hosts: int) -> Prepare:
    return Prepare(7, plan.digest, plan, {}, tuple(range(hosts)), ("", 0), 1)


class World:
    """Participants that do what they are told, in an order that `choose` decides, and one that does not.

    A push, or receivers that join: then host 0 holds the version already, and brings it to the others.
    """

    def __init__(
        self,
        plan: Plan,
        hosts: int,
        choose: random.Random,
        fault: tuple[str, Peer, int] | None,
        *,
        joins: bool = False,
    ):
        self.plan, self._choose, self._fault = plan, choose, fault
        self.receivers = {rank: rank % hosts for rank in plan.receivers}
        prepare = prepare_for(plan, hosts) if hosts > 1 else None
        begins = {host: Begin(7, plan.digest, plan, (), 0, 1.0) for host in range(hosts)}
        self._joins = joins
        if joins and prepare is not None:
            prepare = msgspec.structs.replace(prepare, held=Held(0, ("path",), 0, "name"))
        committed = {b.index: {o: f"{b.index}/{o}" for o in b.owners} for b in plan.buckets}
        self.push = Transaction(plan, begins, self.receivers, prepare, committed if joins else None)
        self.peers = sorted(self.push.stagers | self.push.receivers)
        self._unconnected = list(self.peers)
        #: What each has yet to read.
        self.inbox: dict[Peer, deque[Message]] = defaultdict(deque)
        self._done: dict[Peer, int] = defaultdict(int)
        self._freed: dict[Peer, set[int]] = defaultdict(set)
        self.applied: dict[int, dict[int, dict[int, str]]] = {rank: {} for rank in plan.receivers}
        self.filled: dict[int, set[int]] = defaultdict(set)
        self.transferred: dict[int, set[int]] = defaultdict(set)
        self.committed: set[Peer] = set()
        self.struck: Peer | None = None
        self._opened = False
        self._begun: set[Peer] = set()
        #: Buckets in the order in which they were given to each receiver.
        self._given: dict[Peer, list[int]] = defaultdict(list)
        self._finish: set[Peer] = set()
        #: Those that were told what this push is.
        self._welcomed: set[Peer] = set()
        self._has_prepared: set[Peer] = set()
        self._has_voted: set[Peer] = set()
        self._has_committed: set[Peer] = set()
        #: Buckets in the order in which the last of their owners filled them.
        self._complete: list[int] = []
        for bucket in plan.buckets if joins else ():
            self.filled[bucket.index] = set(bucket.owners)

    def run(self) -> None:
        while self.push.state not in (State.DONE, State.FAILED):
            assert self.push.missing() == self.owed()
            assert self.push.staged == self.staged()
            actions = [*self._unconnected, *(p for p in self.peers if self._can_act(p))]
            if not self._opened and (not self.plan.retains or self.push.staged):
                self._opened = True
                self._out(self.push.open_delivery())
                continue
            if not actions:
                assert self.struck is not None, "it waits for somebody who has nothing to do"
                assert self.struck in self.push.missing(), "nobody would ever notice"
                self._out(self.push.gone(self.struck, "was silent"))
                continue
            peer = self._choose.choice(actions)
            if peer in self._unconnected:
                self._unconnected.remove(peer)
                self._out(self.push.hello(peer, self._host(peer)))
            else:
                self._act(peer)

    def staged(self) -> bool:
        """Worked out from everything that was said so far."""
        hosts = {peer.rank for peer in self.peers if peer.role == AGENT}
        return all(
            self.filled[b.index] == set(b.owners) and self.transferred[b.index] >= hosts
            for b in self.plan.buckets
        )

    def owed(self) -> dict[Peer, str]:
        """Whose turn it is to say what, worked out from everything that was said so far."""
        open_to = (SENDER, AGENT) if self.push.state is State.STAGING else (SENDER, AGENT, RECEIVER)
        found = {p: self._owes(p) for p in self.peers if p.role in open_to and p not in self._unconnected}
        found |= {p: "to connect" for p in self._unconnected if p.role in open_to}
        return {peer: what for peer, what in found.items() if what}

    def _owes(self, peer: Peer) -> str:
        agents = [p for p in self.peers if p.role == AGENT]
        unprepared = {p for p in agents if p not in self._has_prepared}
        if peer.role == AGENT:
            if peer in unprepared:
                return "to make room and meet the other hosts"
            left = [i for i in self._complete if peer.rank not in self.transferred[i]]
            return f"to transfer bucket {left[0]}" if left else ""
        if Peer(AGENT, self._host(peer)) in unprepared:
            return ""
        if peer.role == SENDER:
            own = [b for b in self.plan.buckets if peer.rank in b.owners]
            left = [b.index for b in own if peer.rank not in self.filled[b.index]]
            return f"to fill bucket {left[0]}" if left and self._free(left[0]) else ""
        if self.push.state is State.COMMITTING:
            return "to commit" if peer not in {*self._has_committed, *self.push.lost} else ""
        if peer in self._finish:
            return "to finish loading" if peer not in self._has_voted else ""
        left = [i for i in self._given[peer] if i not in self.applied[peer.rank]]
        return f"to apply bucket {left[0]}" if left else ""

    def _free(self, index: int) -> bool:
        after = self.plan.buckets[index].after
        return after < 0 or all(after in self.applied[r] for r in self.plan.buckets[after].receivers)

    def _host(self, peer: Peer) -> int:
        if peer.role == AGENT:
            return peer.rank
        return self.receivers[peer.rank] if peer.role == RECEIVER else 0

    def _can_act(self, peer: Peer) -> bool:
        if peer == self.struck or peer in self._unconnected:
            return False
        return bool(self.inbox[peer]) or self._next_fill(peer) is not None

    def _next_fill(self, peer: Peer) -> int | None:
        if peer not in self._begun:
            return None
        own = [
            b for b in self.plan.buckets if peer.rank in b.owners and peer.rank not in self.filled[b.index]
        ]
        return own[0].index if own and (own[0].after < 0 or own[0].after in self._freed[peer]) else None

    def _act(self, peer: Peer) -> None:
        self._done[peer] += 1
        if self._fault and self._fault[1:] == (peer, self._done[peer]) and self._strike(peer):
            return
        index = self._next_fill(peer)
        if index is not None and (not self.inbox[peer] or self._choose.random() < 0.5):
            self.filled[index].add(peer.rank)
            if self.filled[index] == set(self.plan.buckets[index].owners):
                self._complete.append(index)
            self._say(peer, Filled(index, f"{index}/{peer.rank}"))
        elif self.inbox[peer]:
            self._answer(peer, self.inbox[peer].popleft())

    def _strike(self, peer: Peer) -> bool:
        """Go wrong, if there is something to go wrong about."""
        assert self._fault is not None
        kind = self._fault[0]
        if kind == "lies":
            message = self.inbox[peer][0] if self.inbox[peer] else None
            if isinstance(message, Deliver):
                answer: Message = Applied(message.bucket, dict.fromkeys(message.digests, "other"))
            elif isinstance(message, Finish):
                answer = Finished("other", "")
            else:
                return False
            self.struck = peer
            self._say(peer, answer)
        else:
            self.struck = peer
            if kind == "dies":
                self._out(self.push.gone(peer, "died"))
            else:
                self._say(peer, Failed("out of luck") if kind == "fails" else Begin(1, "", None, (), 0, 1.0))
        return True

    def _answer(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Free):
            self._freed[peer].add(message.bucket)
        elif isinstance(message, Prepare):
            self._has_prepared.add(peer)
            self._say(peer, Prepared("", 0))
        elif isinstance(message, Transfer):
            self.transferred[message.bucket].add(peer.rank)
            came = self._joins and peer.rank != 0
            self._say(peer, Transferred(message.bucket, self.push.digests[message.bucket] if came else {}))
        elif isinstance(message, Deliver):
            applied = self.applied[peer.rank]
            assert message.bucket not in applied, "delivered once"
            applied[message.bucket] = message.digests
            self._say(peer, Applied(message.bucket, message.digests))
        elif isinstance(message, Finish):
            own = [b.index for b in self.plan.buckets if peer.rank in b.receivers]
            assert sorted(self.applied[peer.rank]) == own, "all that it needs was delivered"
            self._has_voted.add(peer)
            self._say(peer, Finished(version_digest(self.applied[peer.rank][i] for i in own), ""))
        elif isinstance(message, Commit):
            self.committed.add(peer)
            if peer.role == RECEIVER:
                self._has_committed.add(peer)
                self._say(peer, Committed())
        elif isinstance(message, Begin):
            if peer.role == SENDER:
                self._begun.add(peer)
        else:
            assert isinstance(message, Abort)

    def _say(self, peer: Peer, message: Message) -> None:
        self._out(self.push.receive(peer, message))

    def _out(self, messages: object) -> None:
        for peer, message in messages:  # type: ignore[attr-defined]
            if isinstance(message, Deliver):
                bucket = self.plan.buckets[message.bucket]
                assert self.filled[bucket.index] == set(bucket.owners), "filled before it is delivered"
                assert message.digests == {o: f"{bucket.index}/{o}" for o in bucket.owners}
                assert peer in self._welcomed
                self._given[peer].append(bucket.index)
                if self.push._agents:
                    assert self.receivers[peer.rank] in self.transferred[bucket.index]
            elif isinstance(message, Free):
                readers = self.plan.buckets[message.bucket].receivers
                assert all(message.bucket in self.applied[rank] for rank in readers)
            elif isinstance(message, Begin):
                self._welcomed.add(peer)
            elif isinstance(message, Transfer) and self._joins:
                agents = {p for p in self.peers if p.role == AGENT}
                assert agents <= self._has_prepared, "nobody waits for one that may not come"
                if message.bucket not in self._complete:
                    self._complete.append(message.bucket)
            elif isinstance(message, Finish):
                assert peer in self._welcomed
                self._finish.add(peer)
            elif isinstance(message, Commit):
                assert self.push.state in (State.COMMITTING, State.DONE)
            self.inbox[peer].append(message)


worlds = st.tuples(plans(), st.integers(1, 3), st.randoms(use_true_random=False), st.just(False)) | st.tuples(
    plans(slots=(0,)), st.integers(1, 3), st.randoms(use_true_random=False), st.just(True)
)


@settings(max_examples=30, deadline=None)
@given(worlds)
def test_without_faults_a_push_ends_with_everything_applied_once(
    world: tuple[Plan, int, random.Random, bool],
) -> None:
    plan, hosts, choose, joins = world
    run = World(plan, hosts, choose, None, joins=joins)
    run.run()
    assert run.push.state is State.DONE
    assert not run.push.lost
    for rank, applied in run.applied.items():
        assert sorted(applied) == [b.index for b in plan.buckets if rank in b.receivers]


@settings(max_examples=50, deadline=None)
@given(worlds, st.sampled_from(FAULTS), st.integers(0, 20), st.integers(1, 8))
def test_one_fault_fails_the_push_by_name_or_comes_too_late(
    world: tuple[Plan, int, random.Random, bool], kind: str, whom: int, when: int
) -> None:
    plan, hosts, choose, joins = world
    peers = World(plan, hosts, choose, None, joins=joins).peers
    if not peers:
        return
    culprit = peers[whom % len(peers)]
    run = World(plan, hosts, choose, (kind, culprit, when), joins=joins)
    run.run()
    if run.push.state is State.DONE:
        # It had done its part, or it was after the vote.
        assert set(run.push.lost) <= {culprit}
    else:
        assert run.push.error is not None
        assert run.push.error.culprit == run.struck == culprit
        assert str(culprit) in str(run.push.error)
        assert not run.committed
        told = [m for peer in run.peers for m in run.inbox[peer]]
        assert not any(isinstance(m, Commit) for m in told)
        for peer in run.push._present - {culprit}:
            assert any(isinstance(m, Abort) for m in run.inbox[peer]), "everybody is told"


def _one_bucket(slots: int = 0) -> Transaction:
    plan = plan_push(Manifest.whole([TensorSpec("a", "int8", (9,))]), [0], bucket_bytes=256, slots=slots)
    return Transaction(plan, {0: Begin(7, plan.digest, plan, (), 0, 1.0)}, {0: 0})


def test_a_push_that_failed_before_delivery_stays_failed_and_delivers_nothing() -> None:
    """While the engines are paused a trainer rank may die."""
    push = _one_bucket(slots=2)
    list(push.hello(Peer(SENDER, 0), 0))
    list(push.hello(Peer(RECEIVER, 0), 0))
    list(push.gone(Peer(SENDER, 0), "died"))
    assert list(push.open_delivery()) == []
    assert list(push.fail("the push was cancelled")) == []
    assert push.state is State.FAILED
    assert push.error is not None
    assert push.error.culprit == Peer(SENDER, 0)


def test_a_bucket_that_is_filled_before_its_place_is_free_is_out_of_turn() -> None:
    specs = [TensorSpec(f"t{i}", "int8", (9,)) for i in range(3)]
    plan = plan_push(Manifest.whole(specs), [0], bucket_bytes=256, slots=2)
    push = Transaction(plan, {0: Begin(7, plan.digest, plan, (), 0, 1.0)}, {0: 0})
    sender = Peer(SENDER, 0)
    list(push.hello(sender, 0))
    for index in range(3):
        list(push.receive(sender, Filled(index, "digest")))
    assert push.error is not None
    assert push.error.culprit == sender


@pytest.mark.parametrize("peer", [Peer(SENDER, 1), Peer(RECEIVER, 5), Peer(AGENT, 0)], ids=str)
def test_a_stranger_is_sent_away_and_changes_nothing(peer: Peer) -> None:
    push = _one_bucket()
    ((to, message),) = push.hello(peer, 0)
    assert to == peer
    assert isinstance(message, Abort)
    # What it says on its way out.
    assert list(push.receive(peer, Failed("sent away"))) == []
    assert list(push.gone(peer, "left")) == []
    assert push.state is State.STAGING


def test_a_participant_on_an_unknown_host_is_named() -> None:
    push = _one_bucket()
    messages = list(push.hello(Peer(RECEIVER, 0), 3))
    assert any(isinstance(message, Abort) for _, message in messages)
    assert push.error is not None
    assert push.error.culprit == Peer(RECEIVER, 0)
    assert "host 3" in str(push.error)


def test_a_receiver_that_needs_nothing_is_told_to_begin_before_it_is_told_to_finish() -> None:
    """Its host's agent comes late."""
    needs = {0: {"a": [((0, 9),)]}, 1: {}}
    manifest = Manifest.whole([TensorSpec("a", "int8", (9,))])
    plan = plan_push(manifest, [0, 1], bucket_bytes=256, slots=2, needs=needs)
    begins = dict.fromkeys((0, 1), Begin(7, plan.digest, plan, (), 0, 1.0))
    push = Transaction(plan, begins, {0: 0, 1: 1}, prepare_for(plan, 2))
    early, agent = Peer(RECEIVER, 1), Peer(AGENT, 1)
    assert list(push.hello(early, 1)) == []
    assert list(push.open_delivery()) == []
    list(push.hello(agent, 1))
    told = [message for _, message in push.receive(agent, Prepared("", 0))]
    assert [type(message) for message in told] == [Begin, Finish]


def test_a_source_may_leave_once_the_others_have_everything() -> None:
    """Receivers join on host 1; what has come there is compared with what was committed."""
    plan = plan_push(Manifest.whole([TensorSpec("a", "int8", (9,))]), [0], bucket_bytes=256)
    begins = dict.fromkeys((0, 1), Begin(7, plan.digest, plan, (), 0, 1.0))
    prepare = msgspec.structs.replace(prepare_for(plan, 2), held=Held(0, ("path",), 0, "name"))
    source, other, receiver = Peer(AGENT, 0), Peer(AGENT, 1), Peer(RECEIVER, 0)

    def staged(digest: str) -> Transaction:
        push = Transaction(plan, begins, {0: 1}, prepare, staged={0: {0: "digest"}})
        assert push.stagers == {source, other}
        for agent in (source, other):
            list(push.hello(agent, agent.rank))
        assert list(push.receive(other, Prepared("", 0))) == [], "nobody waits for one that is not ready"
        assert push.missing() == {source: "to make room and meet the other hosts"}
        told = list(push.receive(source, Prepared("", 0)))
        assert told == [(source, Transfer(0)), (other, Transfer(0))]
        list(push.receive(source, Transferred(0)))
        list(push.receive(other, Transferred(0, {0: digest})))
        return push

    push = staged("digest")
    assert push.staged
    list(push.open_delivery())
    assert list(push.gone(source, "died")) == []
    told = [message for _, message in push.hello(receiver, 1)]
    assert told[1:] == [Deliver(0, {0: "digest"})]
    list(push.gone(other, "died"))
    assert push.error is not None
    assert push.error.culprit == other

    push = staged("other")
    assert push.error is not None
    assert push.error.culprit == source
