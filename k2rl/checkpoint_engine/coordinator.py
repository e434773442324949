"""Makes pushes: one at a time, with a deadline for everybody, and says who failed.

The coordinator owns its host's arena and remembers the committed version, so that engines can join without
the trainer. It never touches the weights themselves.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch._C._distributed_c10d import TCPStore

from k2rl.checkpoint_engine.arena import HostArena
from k2rl.checkpoint_engine.messages import (
    MAX_HELLO_BYTES,
    Abort,
    Address,
    Begin,
    Hello,
    Prepare,
    TransferError,
    encode,
    read_message,
    same_token,
)
from k2rl.checkpoint_engine.plan import Plan
from k2rl.checkpoint_engine.push import Invitations, OngoingPush, PushReport
from k2rl.checkpoint_engine.transaction import Digests, PushError, State, Transaction


class Hosts(NamedTuple):
    """What a push over several hosts needs besides: the host of each trainer rank, and the agents' calls."""

    of_senders: Mapping[int, int]
    invite_agents: Callable[[], Invitations]


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
        self._push: OngoingPush | None = None
        self._turn = asyncio.Lock()
        self._connections: set[asyncio.Future[None]] = set()
        # Its mode lets nobody else reach the socket in it.
        self._folder = tempfile.TemporaryDirectory(prefix="k2rl-push-")
        #: For participants of the push under way. Each push has a token of its own: whoever was invited to an
        #: earlier one and is late must not bring those weights into this one.
        self.address = Address(secrets.token_hex(16), str(Path(self._folder.name) / "socket"))
        self._listen = listen
        #: Where host agents find each other, if there are other hosts.
        self._store: TCPStore | None = None
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
            push = OngoingPush(self._transaction(begin, receivers, hosts), version, self.deadline_s)
            if not plan.retains:
                self._committed = None

            def invite() -> Invitations:
                return {**invite_senders(), **(hosts.invite_agents() if hosts else {})}

            try:
                return await self._run(push, invite, pause)
            finally:
                self._settle(push, receivers, hosts)

    def _transaction(self, begin: Begin, receivers: Mapping[int, int], hosts: Hosts | None) -> Transaction:
        assert begin.plan is not None
        if hosts is None:
            arena, base = self.arena.reserve(begin.plan)
            begins = {self._host: msgspec.structs.replace(begin, arenas=(arena.path,), base=base)}
            return Transaction(begin.plan, begins, receivers)
        members = tuple(sorted({*hosts.of_senders.values(), *receivers.values()}))
        if members != self._members:
            self._members, self._epoch = members, self._epoch + 1
        if self._store is None:
            raise ValueError("a coordinator of several hosts needs an address that they can reach: `listen`")
        store = (self._listen, self._store.port)
        of_senders = dict(hosts.of_senders)
        prepare = Prepare(
            begin.version, begin.plan_digest, begin.plan, of_senders, members, store, self._epoch
        )
        return Transaction(begin.plan, dict.fromkeys(members, begin), receivers, prepare)

    def _settle(self, push: OngoingPush, receivers: Mapping[int, int], hosts: Hosts | None) -> None:
        """Remember a push that was decided, even if it was cancelled before all had answered."""
        transaction, plan = push.transaction, push.transaction.plan
        if transaction.state in (State.COMMITTING, State.DONE):
            if hosts is None:
                self.arena.commit(plan)
            kept = _kept(transaction, receivers)
            self._committed = _Committed(push.version, plan, transaction.digests, kept)
            return
        # The agents' connections may be broken: they meet anew.
        self._members = ()
        if hosts is None and push.may_be_written:
            self.arena.abandon()

    async def join(
        self, receivers: Mapping[int, int], pause: Callable[[], Awaitable[Invitations]] | None = None
    ) -> PushReport:
        """Bring the committed version to receivers that are new or were restarted; nobody else takes part.

        Waits until the push under way has ended.

        Args:
            receivers: host of each; it must have taken part in the push of that version.
            pause: as for `push`.

        Raises:
            PushError: it failed; only these receivers are concerned.
            ValueError: there is no committed version, or it was not kept on these hosts.
        """
        async with self._turn:
            committed = self._committed
            if committed is None or not committed.begins.keys() >= set(receivers.values()):
                raise ValueError("no committed version is kept that an engine could join at: push one")
            ranks = tuple(receivers)
            buckets = tuple(msgspec.structs.replace(b, receivers=ranks) for b in committed.plan.buckets)
            plan = msgspec.structs.replace(committed.plan, receivers=ranks, buckets=buckets)
            begins = {
                host: msgspec.structs.replace(begin, plan=plan, plan_digest=plan.digest)
                for host, begin in committed.begins.items()
            }
            transaction = Transaction(plan, begins, receivers, staged=committed.digests)
            return await self._run(OngoingPush(transaction, committed.version, self.deadline_s), dict, pause)

    async def _run(
        self,
        push: OngoingPush,
        invite_senders: Callable[[], Invitations],
        pause: Callable[[], Awaitable[Invitations]] | None,
    ) -> PushReport:
        self.address = msgspec.structs.replace(self.address, token=secrets.token_hex(16))
        self._push = push
        try:
            return await push.run(invite_senders, pause)
        finally:
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


def _kept(transaction: Transaction, receivers: Mapping[int, int]) -> dict[int, Begin]:
    """Where the version can be found on each host: the arena's owner first, then those who map it."""
    if not transaction.plan.retains:
        return {}
    return {
        host: msgspec.structs.replace(
            begin,
            arenas=begin.arenas
            + tuple(path for rank, path in transaction.mappings.items() if receivers[rank] == host),
        )
        for host, begin in transaction.begins.items()
    }
