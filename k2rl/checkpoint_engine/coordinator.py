"""Makes pushes: one at a time, with a deadline for everybody, and says who failed.

The coordinator owns its host's arena and remembers the committed version, so that engines can join without
the trainer. It never touches the weights themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch._C._distributed_c10d import TCPStore

from k2rl.checkpoint_engine.arena import HostArena
from k2rl.checkpoint_engine.messages import (
    AGENT,
    MAX_HELLO_BYTES,
    Abort,
    Address,
    Begin,
    DeltaRefusedError,
    Held,
    Hello,
    Peer,
    Prepare,
    TransferError,
    encode,
    read_message,
    same_token,
)
from k2rl.checkpoint_engine.plan import Plan
from k2rl.checkpoint_engine.push import Invitations, OngoingPush, PushReport
from k2rl.checkpoint_engine.transaction import Digests, PushError, State, Transaction, version_digest
from k2rl.diagnosis.activity import PUSH

_NO_LISTENING = "a coordinator of several hosts needs an address that they can reach: `listen`"


class Hosts(NamedTuple):
    """What a push over several hosts needs besides."""

    #: Host of each trainer rank.
    of_senders: Mapping[int, int]
    #: Makes the calls that make the agents of these hosts take part.
    invite_agents: Callable[[Collection[int]], Invitations]


class _Committed(msgspec.Struct, frozen=True):
    version: int
    plan: Plan
    digests: Digests
    #: What participants on each host begin with; none if the version was not kept.
    begins: dict[int, Begin]


class Coordinator:
    """Use as an asynchronous context manager."""

    def __init__(self, deadline_s: float = 60.0, host: int = 0, listen: str = "") -> None:
        """
        Args:
            deadline_s: a participant that owes an answer for longer has failed.
            host: number of the host that this process is on.
            listen: address of this host under which others reach it; empty: there are no others.
        """
        self.deadline_s = deadline_s
        self._host = host
        #: This host's.
        self.arena = HostArena()
        self._committed: _Committed | None = None
        #: Sets of tensors that some receiver takes whole and together or not at all.
        self.together: set[tuple[str, ...]] = set()
        self._push: OngoingPush | None = None
        self._turn = asyncio.Lock()
        self._connections: set[asyncio.Future[None]] = set()
        # Its mode lets nobody else reach the socket in it.
        self._folder = tempfile.TemporaryDirectory(prefix="k2rl-push-")
        #: For participants of the push under way. Each push has a token of its own: whoever was invited to an
        #: earlier one and is late must not bring those weights into this one.
        self.address = Address(secrets.token_hex(16), str(Path(self._folder.name) / "socket"))
        self._listen = listen
        #: By which host agents find each other, if there are other hosts.
        self._store: TCPStore | None = None
        #: Where host agents find each other: another epoch for each set of connections.
        self._epochs = itertools.count(1)
        #: Of the connections that agents keep from push to push.
        self._epoch = 0
        self._members: tuple[int, ...] = ()

    async def __aenter__(self) -> Coordinator:
        self._servers = [await asyncio.start_unix_server(self._connected, self.address.path)]
        if self._listen:
            self._servers.append(await asyncio.start_server(self._connected, self._listen, 0))
            self._store = TCPStore(self._listen, 0, is_master=True, wait_for_workers=False)
        return self

    @property
    def remote_address(self) -> Address:
        """As `address`, for participants on other hosts."""
        return Address(self.address.token, "", self._servers[1].sockets[0].getsockname()[:2])

    def address_for(self, host: int) -> Address:
        """`address` on this host, `remote_address` on another.

        Raises:
            ValueError: nobody listens to other hosts.
        """
        if host == self._host:
            return self.address
        if not self._listen:
            raise ValueError(_NO_LISTENING)
        return self.remote_address

    async def __aexit__(self, *error: object) -> None:
        for server in self._servers:
            server.close()
        if self._push is not None:
            self._push.end("the coordinator was closed")
        # At once if that was in time, within the deadline if all are committing.
        async with self._turn:
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            self.arena.close()
            self._committed = None
            self._store = None  # it has no other way to be closed
            self._folder.cleanup()

    @property
    def version(self) -> int | None:
        """The version committed last."""
        return self._committed.version if self._committed else None

    async def push(
        self,
        version: int,
        plan: Plan,
        receivers: Mapping[int, int],
        invite_senders: Callable[[], Invitations],
        pause: Callable[[], Awaitable[Invitations]] | None = None,
        hosts: Hosts | None = None,
    ) -> PushReport:
        """Bring a new version to all receivers, or fail and say why. One at a time.

        Args:
            version: must be newer than the committed one.
            plan: the senders must hold what it says.
            receivers: host of each receiver.
            invite_senders: makes the calls that make trainer ranks take part.
            pause: pauses the engines and invites their receivers. It is called once everything lies in the
                arenas if the plan retains, else at the start.
            hosts: if senders and receivers are not all on the coordinator's host.

        Raises:
            PushError: it failed; the committed version is what it was.
            DeltaRefusedError: the committed version is not the one that the plan builds on.
            ValueError: the version is not newer, the plan is for others, or another push is under way.
        """
        if self._turn.locked():
            under_way = f" of version {self._push.version}" if self._push else ""
            raise ValueError(f"a push{under_way} is under way: wait until it has ended")
        if set(receivers) != set(plan.receivers):
            raise ValueError(f"the plan is for receivers {sorted(plan.receivers)}, not {sorted(receivers)}")
        if not receivers and not plan.retains:
            raise ValueError("a ring of buckets needs somebody who applies them")
        async with self._turn:
            if not self._servers[0].is_serving():
                raise PushError("the coordinator was closed")
            if self.version is not None and version <= self.version:
                raise ValueError(f"version {version} is not newer than {self.version}, which is committed")
            begin = Begin(version, plan.digest, plan, (), 0, self.deadline_s)
            if plan.base is not None and plan.retains and plan.base != self.version:
                raise DeltaRefusedError(
                    f"version {self.version} is committed, and the delta builds on {plan.base}"
                )
            if hosts is None:
                await self._reserve(plan)
            push = OngoingPush(self._transaction(begin, receivers, hosts), version, self.deadline_s)
            if not plan.retains:
                self._committed = None

            def invite() -> Invitations:
                return {**invite_senders(), **(hosts.invite_agents(self._members) if hosts else {})}

            try:
                return await self._run(push, invite, pause)
            finally:
                self._settle(push, receivers, hosts)

    async def _reserve(self, plan: Plan) -> None:
        """Make room in this host's arena; for a delta in a thread, since it may copy a whole version."""
        if plan.base is None:
            self.arena.reserve(plan)
            return
        reserving = asyncio.ensure_future(asyncio.to_thread(self.arena.reserve, plan))
        try:
            await asyncio.shield(reserving)
        except asyncio.CancelledError:
            await asyncio.wait([reserving])
            raise
        if not self._servers[0].is_serving():
            raise PushError("the coordinator was closed")

    def _transaction(self, begin: Begin, receivers: Mapping[int, int], hosts: Hosts | None) -> Transaction:
        assert begin.plan is not None
        if hosts is None:
            arena, base = self.arena.being_written
            begins = {
                self._host: msgspec.structs.replace(
                    begin, arenas=(arena.path,), base=base, arena_name=arena.name
                )
            }
            return Transaction(begin.plan, begins, receivers)
        members = tuple(sorted({*hosts.of_senders.values(), *receivers.values()}))
        if members != self._members:
            self._members, self._epoch = members, next(self._epochs)
        prepare = self._prepare(begin, hosts.of_senders, members, self._epoch)
        return Transaction(begin.plan, dict.fromkeys(members, begin), receivers, prepare)

    def _prepare(
        self, begin: Begin, host_of: Mapping[int, int], hosts: tuple[int, ...], epoch: int
    ) -> Prepare:
        if self._store is None:
            raise ValueError(_NO_LISTENING)
        store = (self._listen, self._store.port)
        return Prepare(begin.version, begin.plan_digest, begin.plan, dict(host_of), hosts, store, epoch)

    def _settle(self, push: OngoingPush, receivers: Mapping[int, int], hosts: Hosts | None) -> None:
        """Remember a push that was decided, even if it was cancelled before all had answered."""
        transaction, plan, before = push.transaction, push.transaction.plan, self._committed
        if transaction.state in (State.COMMITTING, State.DONE):
            if hosts is None:
                self.arena.commit(plan, push.version)
            kept = _kept(transaction, receivers)
            digests = transaction.digests
            if plan.base is not None and plan.retains:
                assert before is not None
                plan, digests = before.plan, _updated(before, transaction)
            self._committed = _Committed(push.version, plan, digests, kept)
            if hosts is not None:
                self.arena.close()  # what it held, agents hold now
            return
        # The agents' connections may be broken: they meet anew.
        self._members = ()
        if hosts is None and push.may_be_written:
            self.arena.abandon()

    @property
    def digest(self) -> str:
        """Of the committed version's bytes; empty if there is none. Equal for equal bytes in equal plans."""
        if self._committed is None:
            return ""
        digests = self._committed.digests
        return version_digest(digests[index] for index in sorted(digests))

    async def join(
        self,
        receivers: Mapping[int, int],
        pause: Callable[[], Awaitable[Invitations]] | None = None,
        hosts: Hosts | None = None,
    ) -> PushReport:
        """Bring the committed version to receivers that are new or were restarted; nobody else is disturbed.

        To hosts that do not hold it, it comes from the arena of one that does, and is checked there; then
        they hold it, too. If that fails because of the source, another is tried. Waits until the push under
        way has ended.

        Args:
            receivers: host of each.
            pause: as for `push`.
            hosts: needed if one of them does not hold the version yet.

        Raises:
            PushError: it failed; only these receivers are concerned.
            ValueError: there is no committed version, none is kept, or there are no agents to bring it.
        """
        async with self._turn:
            committed = self._committed
            if committed is None:
                raise ValueError("no committed version is there that an engine could join at: push one")
            if not committed.plan.retains:
                raise ValueError(
                    "a ring of buckets keeps no version that an engine could join at: wait for the next "
                    "push, or set checkpoint_engine.memory_mib=0 so that versions are kept"
                )
            new = tuple(sorted(set(receivers.values()) - committed.begins.keys()))
            if not new:
                return await self._join(committed, receivers, pause)
            if hosts is None:
                raise ValueError(f"hosts {list(new)} do not hold the version, and no agents can bring it")
            failures = []
            for source in tuple(committed.begins):
                try:
                    return await self._join(committed, receivers, pause, hosts, (source, *new))
                except PushError as error:
                    if error.culprit != Peer(AGENT, source):
                        raise
                    failures.append(f"from host {source}: {error}")
            raise PushError(
                f"version {committed.version} cannot be brought to hosts {list(new)}: "
                f"{'; '.join(failures) or 'no host holds it any more'}; the next push brings one"
            )

    async def _join(
        self,
        committed: _Committed,
        receivers: Mapping[int, int],
        pause: Callable[[], Awaitable[Invitations]] | None,
        hosts: Hosts | None = None,
        chain: tuple[int, ...] = (),
    ) -> PushReport:
        """One attempt; `chain`: a host that holds the version and those that shall."""
        plan = _plan_for(tuple(receivers), committed.plan)
        begins = {
            host: msgspec.structs.replace(begin, plan=plan, plan_digest=plan.digest)
            for host, begin in committed.begins.items()
        }
        prepare = None
        if chain:
            source, *new = chain
            held = begins[source]
            begins |= dict.fromkeys(new, msgspec.structs.replace(held, arenas=(), arena_name=""))
            owners = {owner for bucket in plan.buckets for owner in bucket.owners}
            prepare = msgspec.structs.replace(
                self._prepare(held, dict.fromkeys(owners, source), chain, next(self._epochs)),
                held=Held(source, held.arenas, held.base, held.arena_name),
            )
        transaction = Transaction(plan, begins, receivers, prepare, staged=committed.digests)
        push = OngoingPush(transaction, committed.version, self.deadline_s)
        try:
            return await self._run(push, lambda: hosts.invite_agents(chain) if hosts else {}, pause)
        except PushError as error:
            # Who failed may have been started anew by the next push.
            self._members = ()
            lost = error.culprit if error.arena_lost else None
            if lost is not None:
                committed.begins.pop(lost.rank if lost.role == AGENT else receivers[lost.rank], None)
            raise
        finally:
            if transaction.state in (State.COMMITTING, State.DONE):
                for host in {*receivers.values()}:
                    begin = committed.begins.get(host, transaction.begins[host])
                    committed.begins[host] = _with_mappings(begin, transaction, receivers, host)

    async def _run(
        self,
        push: OngoingPush,
        invite_senders: Callable[[], Invitations],
        pause: Callable[[], Awaitable[Invitations]] | None,
    ) -> PushReport:
        self.address = msgspec.structs.replace(self.address, token=secrets.token_hex(16))
        self._push = push
        try:
            with PUSH.doing(f"version {push.version}"):
                return await push.run(invite_senders, pause)
        finally:
            self.together |= push.transaction.together
            self._push = None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = await asyncio.wait_for(read_message(reader, MAX_HELLO_BYTES), self.deadline_s)
            if not isinstance(hello, Hello):
                return
            if self._push is None or not same_token(hello.token, self.address.token):
                writer.write(encode(Abort(f"{hello.peer}: no push that it was invited to is under way")))
                return
            await self._push.take_part(hello, reader, writer)
        except (asyncio.IncompleteReadError, TransferError, TimeoutError, ConnectionError):
            pass  # it has said nothing yet that anybody waits for; who should have is found by the deadline
        finally:
            writer.close()


def _updated(before: _Committed, transaction: Transaction) -> Digests:
    """Digests of all of a version that a delta has made of the one before."""
    return {
        bucket.index: {**before.digests[bucket.index], **transaction.wholes.get(bucket.offset, {})}
        for bucket in before.plan.buckets
    }


def _plan_for(ranks: tuple[int, ...], plan: Plan) -> Plan:
    """What receivers get who join: everything, since one that was restarted learns from whole tensors."""
    buckets = tuple(msgspec.structs.replace(bucket, receivers=ranks) for bucket in plan.buckets)
    return msgspec.structs.replace(plan, receivers=ranks, buckets=buckets)


def _kept(transaction: Transaction, receivers: Mapping[int, int]) -> dict[int, Begin]:
    """Where the version can be found on each host."""
    if not transaction.plan.retains:
        return {}
    return {
        host: _with_mappings(begin, transaction, receivers, host)
        for host, begin in transaction.begins.items()
    }


def _with_mappings(begin: Begin, transaction: Transaction, receivers: Mapping[int, int], host: int) -> Begin:
    """What was known of a host's arena before, and the mappings of the receivers there."""
    mapped = (path for rank, path in transaction.mappings.items() if receivers[rank] == host)
    return msgspec.structs.replace(begin, arenas=(*begin.arenas, *mapped))
