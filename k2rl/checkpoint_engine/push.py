"""A push under way: the connections of those who take part, and the clocks that find who is silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import msgspec

from k2rl.checkpoint_engine.messages import (
    AGENT,
    Abort,
    Alive,
    Failed,
    Hello,
    Peer,
    TransferError,
    encode,
    read_message,
)
from k2rl.checkpoint_engine.transaction import Outgoing, State, Transaction
from k2rl.diagnosis.activity import PUSH
from k2rl.diagnosis.processes import in_a_word

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


class OngoingPush:
    """A push under way."""

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
        self._said_alive = self._looked = time.monotonic()
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
        if now - self._looked < TICK_S:
            return
        self._looked = now
        missing = self.transaction.missing()
        since: dict[Peer, tuple[str, float]] = {}
        for peer, what in missing.items():
            known = self._since.get(peer)
            since[peer] = known if known is not None and known[0] == what else (what, now)
        self._since = since
        PUSH.note("waiting for " + ", ".join(f"{peer} {what}" for peer, what in missing.items()))
        if self.transaction.blamed:
            self._blamed_since = self._blamed_since or now
            if now - self._blamed_since > GRACE_S:
                self._send(self.transaction.conclude())
            return
        for peer, (what, start) in since.items():
            # Agents that wait for another give up at the deadline, too, and say which it was.
            patience = self._deadline_s + (2 * GRACE_S if peer.role == AGENT else 0)
            if now - start > patience:
                process = self._pids.get(peer)
                pid, now_does = ("", "") if process is None else (f" (process {process})", in_a_word(process))
                late = f"{pid} did not come {what} within {self._deadline_s:g} s{now_does}"
                self._send(self.transaction.gone(peer, late.strip()))
                return
