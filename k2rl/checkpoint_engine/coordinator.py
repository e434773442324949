"""Makes pushes: one at a time, with a deadline for everybody, and says who failed.

The coordinator owns its host's arena and remembers the committed version, so that engines can join without
the trainer. It never touches the weights themselves.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
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
    Alive,
    Begin,
    DeltaRefusedError,
    Failed,
    Hello,
    Peer,
    Prepare,
    TransferError,
    encode,
    read_message,
    same_token,
)
from k2rl.checkpoint_engine.plan import Plan
from k2rl.checkpoint_engine.transaction import Digests, Outgoing, PushError, State, Transaction

#: Of an invitation: the call that makes a participant take part. If it fails, the push does.
Invitations = Mapping[Peer, Awaitable[object]]

#: How often silent participants are looked for.
TICK_S = 0.25


#: How long agents that failed with each other may take to say so.
GRACE_S = 1.0


class PushReport(msgspec.Struct, frozen=True):
    """What a push did and how long it took."""

    version: int
    nbytes: int
    buckets: int
    #: From the first participant's begin to the last bucket lying in every arena.
    stage_s: float
    #: From the first delivery (all engines paused) to the commit.
    apply_s: float
    total_s: float
    #: Receivers that died after all had voted; the version stands without them.
    lost: tuple[int, ...] = ()


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
        #: Sets of tensors that some receiver takes whole and together or not at all.
        self.together: set[tuple[str, ...]] = set()
        self._push: _Push | None = None
        self._turn = asyncio.Lock()
        self._connections: set[asyncio.Future[None]] = set()
        # Its mode lets nobody else reach the socket in it.
        self._folder = tempfile.TemporaryDirectory(prefix="k2rl-push-")
        #: For participants of the push under way. Each push has a token of its own: whoever was invited to an
        #: earlier one and is late must not bring those weights into this one.
        self.address = Address(secrets.token_hex(16), str(Path(self._folder.name) / "socket"))
        self._listen = listen
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
            push = _Push(self._transaction(begin, receivers, hosts), version, self.deadline_s)
            if not plan.retains:
                self._committed = None

            def invite() -> Invitations:
                return {**invite_senders(), **(hosts.invite_agents() if hosts else {})}

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
            begins = {self._host: msgspec.structs.replace(begin, arenas=(arena.path,), base=base)}
            return Transaction(begin.plan, begins, receivers)
        members = tuple(sorted({*hosts.of_senders.values(), *receivers.values()}))
        if members != self._members:
            self._members, self._epoch = members, self._epoch + 1
        store = (self._listen, self._store.port)
        of_senders = dict(hosts.of_senders)
        prepare = Prepare(
            begin.version, begin.plan_digest, begin.plan, of_senders, members, store, self._epoch
        )
        return Transaction(begin.plan, dict.fromkeys(members, begin), receivers, prepare)

    def _settle(self, push: _Push, receivers: Mapping[int, int], hosts: Hosts | None) -> None:
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
            return await self._run(_Push(transaction, committed.version, self.deadline_s), dict, pause)

    async def _run(
        self,
        push: _Push,
        invite_senders: Callable[[], Invitations],
        pause: Callable[[], Awaitable[Invitations]] | None,
    ) -> PushReport:
        self.address = msgspec.structs.replace(self.address, token=secrets.token_hex(16))
        self._push = push
        try:
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


class _Push:
    """A push under way: its connections and clocks."""

    def __init__(self, transaction: Transaction, version: int, deadline_s: float) -> None:
        self.transaction = transaction
        self.version = version
        self._deadline_s = deadline_s
        self._writers: dict[Peer, asyncio.StreamWriter] = {}
        self._pids: dict[Peer, int] = {}
        #: Those that certainly do nothing any more.
        self._left: set[Peer] = set()
        self._since: dict[Peer, tuple[str, float]] = {}
        self._blamed_since = 0.0
        self._said_alive = time.monotonic()
        self._changed = asyncio.Event()

    async def run(
        self,
        invite_senders: Callable[[], Invitations],
        pause: Callable[[], Awaitable[Invitations]] | None,
    ) -> PushReport:
        transaction, plan = self.transaction, self.transaction.plan
        started = time.monotonic()
        watchers = self._watch(invite_senders())
        try:
            if plan.retains:
                await self._until(lambda: transaction.staged)
            staged = time.monotonic()
            if transaction.error is None:
                if pause is not None:
                    watchers += await self._paused(pause)
                self._send(transaction.open_delivery())
                applying = time.monotonic()
                await self._until(lambda: transaction.state is State.DONE)
        finally:
            self.end("the push was cancelled")
            for watcher in watchers:
                watcher.cancel()
            for writer in self._writers.values():
                writer.close()
        if transaction.error is not None:
            raise transaction.error
        done = time.monotonic()
        return PushReport(
            self.version,
            plan.nbytes,
            len(plan.buckets),
            staged - started,
            done - applying,
            done - started,
            tuple(peer.rank for peer in transaction.lost),
        )

    async def _paused(self, pause: Callable[[], Awaitable[Invitations]]) -> list[asyncio.Future[object]]:
        """Pause the engines, within the deadline; the invitations of their receivers."""
        pausing = asyncio.ensure_future(pause())
        pausing.add_done_callback(lambda _: self._changed.set())
        late = time.monotonic() + self._deadline_s
        try:
            await self._until(lambda: pausing.done() or time.monotonic() > late)
            if pausing.done():
                return self._watch(pausing.result())
            self.end(f"the engines did not pause within {self._deadline_s:g} s")
            return []
        finally:
            pausing.cancel()

    def end(self, reason: str) -> None:
        """Fail the push, unless it is decided."""
        self._send(self.transaction.fail(reason))

    @property
    def may_be_written(self) -> bool:
        """Whether somebody may write into the arena yet, although the push has ended."""
        return any(peer not in self._left for peer in self.transaction.unfilled)

    async def take_part(
        self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve one connection until it ends."""
        peer = hello.peer
        if peer in self._writers or peer not in self.transaction.participants:
            writer.write(encode(Abort(f"{peer} takes part already, or has no part in this push")))
            return
        self._writers[peer], self._pids[peer] = writer, hello.pid
        try:
            self._send(self.transaction.hello(peer, hello.host, hello.plan))
            while True:
                message = await read_message(reader)
                if isinstance(message, Failed):
                    self._left.add(peer)
                self._send(self.transaction.receive(peer, message))
        except TransferError as error:
            self._send(self.transaction.fail(f"{peer}: {error}", peer))
        except (asyncio.IncompleteReadError, ConnectionError):
            # If it was us who closed the connection, the peer may be busy still.
            if not writer.is_closing() or self.transaction.error is None:
                self._left.add(peer)
            self._send(self.transaction.gone(peer, f"(process {hello.pid}) died or left in the middle"))

    def _send(self, messages: Iterable[Outgoing]) -> None:
        for peer, message in messages:
            writer = self._writers.get(peer)
            if writer is not None and not writer.is_closing():
                writer.write(encode(message))
        self._changed.set()

    def _watch(self, invitations: Invitations) -> list[asyncio.Future[object]]:
        calls: list[asyncio.Future[object]] = [asyncio.ensure_future(call) for call in invitations.values()]
        for peer, call in zip(invitations, calls, strict=True):
            call.add_done_callback(partial(self._called, peer))
        return calls

    def _called(self, peer: Peer, call: asyncio.Future[object]) -> None:
        """An invitation has ended; if it failed, its error is the reason for which the push fails."""
        error = None if call.cancelled() else call.exception()
        # What a participant raises while it is connected it has told us itself.
        if error is not None and not (peer in self._writers and isinstance(error, TransferError)):
            self._send(self.transaction.gone(peer, f"failed: {error}"))

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds or the push has failed; whoever owes an answer too long fails it."""
        while not condition() and self.transaction.error is None:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), TICK_S)
            self._look_for_silence()
            self._say_alive()

    def _say_alive(self) -> None:
        if time.monotonic() - self._said_alive > self._deadline_s / 4:
            self._said_alive = time.monotonic()
            for writer in self._writers.values():
                if not writer.is_closing():
                    writer.write(encode(Alive()))

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        missing = self.transaction.missing()
        since: dict[Peer, tuple[str, float]] = {}
        for peer, what in missing.items():
            known = self._since.get(peer)
            since[peer] = known if known is not None and known[0] == what else (what, now)
        self._since = since
        if self.transaction.blamed:
            self._blamed_since = self._blamed_since or now
            if now - self._blamed_since > GRACE_S:
                self._send(self.transaction.conclude())
            return
        for peer, (what, start) in since.items():
            # Agents that wait for another give up at the deadline, too, and say which it was.
            patience = self._deadline_s + (2 * GRACE_S if peer.role == AGENT else 0)
            if now - start > patience:
                pid = f" (process {self._pids[peer]})" if peer in self._pids else ""
                self._send(
                    self.transaction.gone(
                        peer, f"{pid} did not come {what} within {self._deadline_s:g} s".strip()
                    )
                )
                return
