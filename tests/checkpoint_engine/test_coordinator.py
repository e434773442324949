"""What the coordinator does about those who come late, twice, uninvited or talk nonsense: raw sockets."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.arena import HostArena
from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.manifest import Manifest, TensorSpec
from k2rl.checkpoint_engine.messages import (
    RECEIVER,
    SENDER,
    Abort,
    Address,
    Applied,
    Begin,
    Commit,
    Committed,
    Deliver,
    DeltaRefusedError,
    Failed,
    Filled,
    Finish,
    Finished,
    Hello,
    Message,
    Peer,
    TransferError,
    decode,
    encode,
    read_message,
)
from k2rl.checkpoint_engine.plan import Plan, plan_delta, plan_push
from k2rl.checkpoint_engine.push import Invitations
from k2rl.checkpoint_engine.transaction import PushError, version_digest

MANIFEST = Manifest.whole([TensorSpec("a", "int8", (9,)), TensorSpec("b", "int8", (300,))])
SENDER_0, RECEIVER_0, RECEIVER_1 = Peer(SENDER, 0), Peer(RECEIVER, 0), Peer(RECEIVER, 1)
DIGEST = "what was written"


def plan_for(*receivers: int, slots: int = 0) -> Plan:
    return plan_push(MANIFEST, receivers, bucket_bytes=512, slots=slots)


class Line:
    """A participant's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, address: Address, peer: Peer, host: int = 0) -> Line:
        line = cls(*await asyncio.open_unix_connection(address.path))
        line.say(Hello(address.token, peer, host, 1, ""))
        return line

    def say(self, message: Message) -> None:
        self.writer.write(encode(message))

    async def hear(self) -> Message:
        return await asyncio.wait_for(read_message(self.reader), 10)

    def close(self) -> None:
        self.writer.close()


async def send(address: Address, peer: Peer = SENDER_0) -> None:
    """A sender's part, without any bytes."""
    line = await Line.open(address, peer)
    with contextlib.closing(line):
        begin = await line.hear()
        assert isinstance(begin, Begin), begin
        assert begin.plan is not None
        for bucket in begin.plan.buckets:
            line.say(Filled(bucket.index, DIGEST))
        message = await line.hear()
        assert isinstance(message, Commit), message


async def receive(address: Address, peer: Peer = RECEIVER_0, until: type[Message] = Committed) -> int:
    """A receiver's part, without any bytes; `until`: what it does not say any more. Returns the version."""
    line = await Line.open(address, peer)
    with contextlib.closing(line):
        begin = await line.hear()
        assert isinstance(begin, Begin), begin
        applied = []
        while isinstance(message := await line.hear(), Deliver):
            applied.append(message.digests)
            line.say(Applied(message.bucket, message.digests))
        assert isinstance(message, Finish), message
        line.say(Finished(version_digest(applied), ""))
        message = await line.hear()
        assert isinstance(message, Commit), message
        if until is not Committed:
            line.say(Committed())
        return begin.version


def run(test: Callable[[Coordinator], Awaitable[None]], deadline_s: float = 20.0) -> None:
    async def with_coordinator() -> None:
        async with Coordinator(deadline_s) as coordinator:
            await asyncio.wait_for(test(coordinator), 30)

    asyncio.run(with_coordinator())


class Push:
    """A push of one sender, paused until it is let go on."""

    def __init__(
        self, coordinator: Coordinator, version: int, receivers: tuple[int, ...] = (0,), slots: int = 0
    ):
        self._coordinator = coordinator
        self.started, self.go_on = asyncio.Event(), asyncio.Event()
        self.joined: list[asyncio.Future[int]] = []
        self._receivers = receivers
        self.address = coordinator.address
        plan = plan_for(*receivers, slots=slots)
        hosts = dict.fromkeys(receivers, 0)
        self.result = asyncio.ensure_future(coordinator.push(version, plan, hosts, self._invite, self._pause))

    def _invite(self) -> Invitations:
        self.address = self._coordinator.address
        return {SENDER_0: send(self.address)}

    async def _pause(self) -> Invitations:
        self.started.set()
        await self.go_on.wait()
        self.joined = [
            asyncio.ensure_future(receive(self.address, Peer(RECEIVER, rank), Message))
            for rank in self._receivers
        ]
        return {Peer(RECEIVER, rank): call for rank, call in zip(self._receivers, self.joined, strict=True)}


async def push(coordinator: Coordinator, version: int, receivers: tuple[int, ...] = (0,)) -> None:
    under_way = Push(coordinator, version, receivers)
    under_way.go_on.set()
    assert (await under_way.result).version == version


@settings(max_examples=60)
@given(
    st.binary(max_size=60) | st.recursive(st.text() | st.integers(0, 9), st.lists).map(msgspec.msgpack.encode)
)
@example(msgspec.msgpack.encode({"type": "Abort", "reason": "x"})[:-1] + b"\xff")
def test_whatever_arrives_is_a_message_or_an_error(body: bytes) -> None:
    with contextlib.suppress(TransferError):
        decode(body)


@pytest.mark.parametrize(
    "noise",
    [b"", b"\0", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64, struct.pack("!I", 1 << 20), encode(Commit())],
    ids=["nothing", "a byte", "http", "huge frame", "large frame", "no hello"],
)
def test_nonsense_on_the_socket_is_cut_off_and_disturbs_nobody(noise: bytes) -> None:
    async def test(coordinator: Coordinator) -> None:
        under_way = Push(coordinator, 1)
        await under_way.started.wait()
        reader, writer = await asyncio.open_unix_connection(coordinator.address.path)
        writer.write(noise)
        if len(noise) > 3:
            assert await asyncio.wait_for(reader.read(), 5) == b"", "cut off at once"
        under_way.go_on.set()
        await under_way.result
        writer.close()

    run(test)


def test_a_late_participant_of_an_earlier_push_has_no_part_in_the_next() -> None:
    """Its weights may be those of the earlier version."""

    async def test(coordinator: Coordinator) -> None:
        await push(coordinator, 1)
        late = coordinator.address
        first = Push(coordinator, 2)
        await first.started.wait()
        late = first.address
        first.result.cancel()
        await asyncio.wait([first.result])
        line = await Line.open(late, SENDER_0)
        assert isinstance(await line.hear(), Abort)

        def invite() -> Invitations:
            return {SENDER_0: interrupted(coordinator.address)}

        async def interrupted(address: Address) -> None:
            early = await Line.open(late, SENDER_0)
            assert isinstance(await early.hear(), Abort)
            await send(address)

        async def pause() -> Invitations:
            return {RECEIVER_0: receive(coordinator.address, until=Message)}

        await coordinator.push(3, plan_for(0), {0: 0}, invite, pause)

    run(test)


@pytest.mark.parametrize("stranger", [SENDER_0, RECEIVER_0, RECEIVER_1, Peer("clown", 0)], ids=str)
def test_a_participant_that_comes_twice_or_uninvited_is_sent_away(stranger: Peer) -> None:
    async def test(coordinator: Coordinator) -> None:
        under_way = Push(coordinator, 1)
        await under_way.started.wait()
        if stranger == RECEIVER_0:
            first = await Line.open(under_way.address, stranger)
            assert isinstance(await first.hear(), Begin)
        line = await Line.open(under_way.address, stranger)
        assert isinstance(await line.hear(), Abort)
        line.say(Failed("TransferError: sent away"))
        assert await line.reader.read() == b""
        if stranger == RECEIVER_0:
            first.close()
            with pytest.raises(PushError, match="receiver 0"):
                await under_way.result
        else:
            under_way.go_on.set()
            await under_way.result

    run(test)


def test_engines_that_do_not_pause_fail_the_push_at_the_deadline() -> None:
    async def test(coordinator: Coordinator) -> None:
        under_way = Push(coordinator, 1)
        with pytest.raises(PushError, match="engines did not pause within 0.5 s"):
            await under_way.result

    run(test, deadline_s=0.5)


def test_an_error_while_pausing_is_the_one_that_is_raised() -> None:
    async def test(coordinator: Coordinator) -> None:
        async def pause() -> Invitations:
            raise ValueError("the engine sleeps")

        with pytest.raises(ValueError, match="sleeps"):
            await coordinator.push(
                1, plan_for(0), {0: 0}, lambda: {SENDER_0: send(coordinator.address)}, pause
            )
        await push(coordinator, 1)

    run(test)


def test_a_trainer_that_dies_while_engines_pause_is_named() -> None:
    async def test(coordinator: Coordinator) -> None:
        plan = plan_for(0, slots=2)
        lines: list[Line] = []
        present = asyncio.Event()

        async def leave() -> None:
            lines.append(await Line.open(coordinator.address, SENDER_0))
            await lines[0].hear()
            present.set()

        async def pause() -> Invitations:
            await present.wait()
            other = await Line.open(coordinator.address, RECEIVER_0)
            lines[0].close()
            # Until the coordinator has told the others, too.
            while not isinstance(await other.hear(), Abort):
                pass
            return {}

        with pytest.raises(PushError, match="trainer rank 0.*died") as caught:
            await coordinator.push(1, plan, {0: 0}, lambda: {SENDER_0: leave()}, pause)
        assert caught.value.culprit == SENDER_0

    run(test)


def test_a_push_that_is_cancelled_after_the_vote_stands() -> None:
    """The receivers have been told to commit."""

    async def test(coordinator: Coordinator) -> None:
        await push(coordinator, 1)
        told = asyncio.Event()

        async def told_but_silent() -> None:
            line = await Line.open(coordinator.address, RECEIVER_0)
            applied = []
            while not isinstance(message := await line.hear(), Commit):
                if isinstance(message, Deliver):
                    applied.append(message.digests)
                    line.say(Applied(message.bucket, message.digests))
                elif isinstance(message, Finish):
                    line.say(Finished(version_digest(applied), ""))
            told.set()

        async def pause() -> Invitations:
            return {RECEIVER_0: told_but_silent()}

        under_way = asyncio.ensure_future(
            coordinator.push(2, plan_for(0), {0: 0}, lambda: {SENDER_0: send(coordinator.address)}, pause)
        )
        await told.wait()
        under_way.cancel()
        await asyncio.wait([under_way])
        assert coordinator.version == 2
        await push(coordinator, 3)

    run(test)


def test_a_receiver_that_dies_after_the_vote_is_lost_and_the_version_stands() -> None:
    async def test(coordinator: Coordinator) -> None:
        async def pause() -> Invitations:
            address = coordinator.address
            return {RECEIVER_0: receive(address), RECEIVER_1: receive(address, RECEIVER_1, Message)}

        hosts = {0: 0, 1: 0}
        report = await coordinator.push(
            1, plan_for(0, 1), hosts, lambda: {SENDER_0: send(coordinator.address)}, pause
        )
        assert report.lost == (0,)
        assert coordinator.version == 1

    run(test)


def test_who_joins_during_a_push_gets_what_that_push_commits() -> None:
    async def test(coordinator: Coordinator) -> None:
        await push(coordinator, 1)
        under_way = Push(coordinator, 2)

        async def pause() -> Invitations:
            return {RECEIVER_1: receive(coordinator.address, RECEIVER_1, Message)}

        await under_way.started.wait()
        joining = asyncio.ensure_future(coordinator.join({1: 0}, pause))
        await asyncio.sleep(0)
        under_way.go_on.set()
        await under_way.result
        assert (await joining).version == 2

    run(test)


def test_a_push_to_nobody_keeps_the_version_for_those_who_join() -> None:
    async def test(coordinator: Coordinator) -> None:
        await push(coordinator, 1, ())

        async def pause() -> Invitations:
            return {RECEIVER_1: receive(coordinator.address, RECEIVER_1, Message)}

        assert (await coordinator.join({1: 0}, pause)).version == 1

    run(test)


def test_a_plan_for_others_is_refused() -> None:
    async def test(coordinator: Coordinator) -> None:
        with pytest.raises(ValueError, match=r"for receivers \[0\], not \[0, 1\]"):
            await coordinator.push(1, plan_for(0), {0: 0, 1: 0}, dict)
        with pytest.raises(ValueError, match="needs somebody"):
            await coordinator.push(1, plan_for(slots=2), {}, dict)

    run(test)


def test_a_coordinator_that_is_closed_ends_its_push_at_once() -> None:
    async def test() -> None:
        coordinator = Coordinator(1000)
        await coordinator.__aenter__()
        under_way = Push(coordinator, 1)
        await under_way.started.wait()
        await coordinator.__aexit__()
        with pytest.raises(PushError, match="was closed"):
            await under_way.result
        for again in (coordinator.push(2, plan_for(0), {0: 0}, dict), coordinator.join({0: 0})):
            with pytest.raises((PushError, ValueError), match="closed|no committed"):
                await again

    asyncio.run(asyncio.wait_for(test(), 30))


def _open_arenas() -> int:
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder's own descriptor
            if "k2rl-weights" in str(path.readlink()):
                found.add(path.stat().st_ino)
    return len(found)


def _blocks(plan: Plan) -> list[tuple[int, int]]:
    """First bytes and ends, in the plan's places."""
    return [
        (bucket.offset + block.offset, bucket.offset + block.offset + block.nbytes)
        for bucket in plan.buckets
        for block in bucket.blocks
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["commit", "fail", "abandon"]),
            st.integers(1, 9),
            st.sampled_from(["full", "ring", "delta", "delta"]),
        )
    )
)
@settings(max_examples=30, deadline=None)
def test_the_arena_keeps_the_committed_version_and_lets_go_of_the_rest(
    pushes: list[tuple[str, int, str]],
) -> None:
    """Whatever sizes are pushed, kept or not, in full or what has changed, and however the pushes end."""
    host = HostArena()
    before = _open_arenas()
    committed: torch.Tensor | None = None
    version, pages_kept = -1, 0
    for number, (outcome, pages, kind) in enumerate(pushes):
        if kind == "delta" and committed is not None:
            pages = pages_kept
        manifest = Manifest.whole([TensorSpec(f"t{i}", "int8", (1000,)) for i in range(pages * 4)])
        plan = plan_push(manifest, [0], bucket_bytes=1024, slots=2 if kind == "ring" else 0)
        if kind == "delta":
            plan = plan_delta(manifest, plan, {f"t{number % (pages * 4)}": [(number % 7, 500)]}, version)
        if plan.base is not None and committed is None:
            with pytest.raises(DeltaRefusedError, match=f"builds on version {version}"):
                host.reserve(plan)
            continue
        arena, base = host.reserve(plan)
        assert base + plan.arena_bytes <= arena.nbytes
        written = arena.memory[base : base + plan.arena_bytes].clone()
        if kind == "ring":
            committed = None
        elif plan.base is not None:
            assert committed is not None
            written = committed.clone()
        for start, stop in _blocks(plan):
            written[start:stop] = number % 250 + 1
            arena.memory[base + start : base + stop] = number % 250 + 1
        if outcome == "commit":
            host.commit(plan, number)
            committed, version, pages_kept = None if kind == "ring" else written, number, pages
        elif outcome == "abandon":
            host.abandon()
        if committed is None:
            assert host.committed is None
        else:
            assert host.committed is not None
            kept, start = host.committed
            assert torch.equal(kept.memory[start : start + len(committed)], committed)
        assert _open_arenas() <= before + 2
    host.close()
    assert _open_arenas() <= before
