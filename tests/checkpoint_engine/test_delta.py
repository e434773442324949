"""Deltas against pushes of everything: the same bits, whatever changes and whatever fails in between."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.manifest import merge
from k2rl.checkpoint_engine.messages import RECEIVER, SENDER, Peer, TransferError
from k2rl.checkpoint_engine.plan import Plan, plan_delta, plan_push
from k2rl.checkpoint_engine.push import Invitations, PushReport
from k2rl.checkpoint_engine.receiver import Receiver
from k2rl.checkpoint_engine.sender import Sender
from tests.checkpoint_engine.parts import (
    BUCKET_BYTES,
    SHAPES,
    Fault,
    FaultyTarget,
    ShardedSource,
    Trigger,
    weights,
)

RANKS = (0, 1)
DEADLINE_S = 30.0


class Step(NamedTuple):
    """Rows that change, what goes wrong in the push of them, and what comes after."""

    rows: list[tuple[str, int]]
    #: Of trainer ranks and receivers, "corrupt", or nothing.
    fault: tuple[str, int, Fault] | str
    #: Whether whoever plans the next push knows that this one failed.
    known: bool
    join: bool


class Pushes:
    """Two trainer ranks and two receivers in this process."""

    def __init__(self, coordinator: Coordinator, slots: int) -> None:
        self.coordinator = coordinator
        self.truth = weights(0)
        self.triggers = {(role, rank): Trigger() for role in (SENDER, RECEIVER) for rank in RANKS}
        self.sources = {rank: ShardedSource(rank, len(RANKS), self.triggers[SENDER, rank]) for rank in RANKS}
        self.senders = {rank: Sender(rank) for rank in RANKS}
        self.targets = {rank: FaultyTarget(self.triggers[RECEIVER, rank]) for rank in RANKS}
        self.receivers = {rank: Receiver(rank, self.targets[rank]) for rank in RANKS}
        self.manifest = merge([source.manifest for source in self.sources.values()])
        self.full = plan_push(self.manifest, RANKS, bucket_bytes=BUCKET_BYTES, slots=slots, cell_bytes=512)
        self.base: int | None = None

    def change(self, rows: list[tuple[str, int]]) -> None:
        for name, row in rows:
            tensor = self.truth[name]
            where = tensor[row % len(tensor)] if tensor.ndim else tensor
            where.copy_(-2 * where - 1)
        for source in self.sources.values():
            for name, (local, first) in source._local.items():
                tensor = self.truth[name]
                local.copy_(tensor[first : first + len(local)] if tensor.ndim else tensor)

    def arm(self, step: Step) -> None:
        for key, trigger in self.triggers.items():
            trigger.arm(step.fault[2] if not isinstance(step.fault, str) and step.fault[:2] == key else None)

    async def publish(self, version: int, step: Step) -> PushReport:
        """As a publisher does: a delta on what was committed, and everything if that is refused."""
        self.arm(Step([], "", True, False))
        plan = self.full
        if self.base is not None:
            changed: dict[str, list[tuple[int, int]]] = {}
            for rank, sender in self.senders.items():
                for name, rows in sender.changes(self.sources[rank], self.full, self.base, version).items():
                    changed.setdefault(name, []).extend(rows)
            plan = plan_delta(self.manifest, self.full, changed, self.base)
        self.arm(step)
        try:
            return await self._push(plan, version, step.fault == "corrupt")
        except TransferError as error:
            if not error.refused:
                raise
        return await self._push(self.full, version, step.fault == "corrupt")

    async def _push(self, plan: Plan, version: int, corrupt: bool) -> PushReport:
        def invite() -> Invitations:
            address = self.coordinator.address
            return {
                Peer(SENDER, rank): asyncio.to_thread(
                    self.senders[rank].send, self.sources[rank], address, DEADLINE_S
                )
                for rank in plan.owners
            }

        async def pause() -> Invitations:
            if corrupt and plan.buckets:
                arena, base = self.coordinator.arena.being_written
                bucket = plan.buckets[-1]
                arena.memory[base + bucket.offset + bucket.blocks[-1].offset] ^= 1
            return {Peer(RECEIVER, rank): self._receive(self.receivers[rank]) for rank in RANKS}

        return await self.coordinator.push(version, plan, dict.fromkeys(RANKS, 0), invite, pause)

    async def _receive(self, receiver: Receiver) -> object:
        return await asyncio.to_thread(receiver.receive, self.coordinator.address, DEADLINE_S)

    async def join(self) -> dict[str, torch.Tensor]:
        """What a receiver that is new holds after it has joined."""
        target = FaultyTarget(Trigger())
        receiver = Receiver(5, target)

        async def pause() -> Invitations:
            return {Peer(RECEIVER, 5): self._receive(receiver)}

        assert (await self.coordinator.join({5: 0}, pause)).version == self.coordinator.version
        receiver.close()
        return target.tensors

    def close(self) -> None:
        for part in (*self.senders.values(), *self.receivers.values()):
            part.close()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in SHAPES)


faults = st.one_of(
    st.just(""),
    st.just(""),
    st.just("corrupt"),
    st.tuples(
        st.sampled_from([SENDER, RECEIVER]),
        st.sampled_from(RANKS),
        st.tuples(st.just("raise"), st.integers(0, 4)),
    ),
)
steps = st.builds(
    Step,
    st.lists(st.tuples(st.sampled_from(sorted(SHAPES)), st.integers(0, 63)), max_size=3),
    faults,
    st.booleans(),
    st.booleans(),
)


@pytest.mark.parametrize("slots", [0, 3])
@settings(max_examples=25, deadline=None)
@given(st.lists(steps, min_size=1, max_size=7))
def test_receivers_hold_the_bits_of_a_full_push(slots: int, sequence: list[Step]) -> None:
    """Receivers, and whoever joins; what changed and was not brought, in a push that failed, comes later."""

    async def run() -> None:
        async with Coordinator(DEADLINE_S) as coordinator:
            pushes = Pushes(coordinator, slots)
            pushes.change([])
            committed = None
            for version, step in enumerate(sequence):
                pushes.change(step.rows)
                before = pushes.base
                try:
                    report = await pushes.publish(version, step)
                except TransferError:
                    assert step.fault
                    if step.known:
                        pushes.base = None
                else:
                    assert same(pushes.targets[0].tensors, pushes.truth)
                    assert same(pushes.targets[1].tensors, pushes.truth)
                    assert report.nbytes <= pushes.full.nbytes
                    if before is not None and before == version - 1 and not step.rows:
                        assert report.nbytes == 0
                    committed = {name: tensor.clone() for name, tensor in pushes.truth.items()}
                    pushes.base = version
                if step.join and slots == 0 and committed is not None:
                    assert same(await pushes.join(), committed)
            pushes.close()

    asyncio.run(asyncio.wait_for(run(), 120))


@pytest.mark.parametrize("slots", [0, 3])
def test_a_delta_is_refused_before_anything_is_changed(slots: int) -> None:
    """By a receiver that was restarted; the other one goes back to the whole version with it."""
    quiet = Step([("head", 3)], "", True, False)

    async def run() -> None:
        async with Coordinator(DEADLINE_S) as coordinator:
            pushes = Pushes(coordinator, slots)
            pushes.change([])
            await pushes.publish(1, quiet)
            pushes.base = 1
            pushes.change(quiet.rows)
            pushes.receivers[1].close()
            pushes.receivers[1] = Receiver(1, pushes.targets[1])
            held = {name: tensor.clone() for name, tensor in pushes.targets[1].tensors.items()}
            plan = plan_delta(pushes.manifest, pushes.full, {"head": [(3, 4)]}, 1)
            for rank in RANKS:
                pushes.senders[rank].changes(pushes.sources[rank], pushes.full, 1, 2)
            with pytest.raises(
                TransferError, match="holds no whole version, and the delta builds on version 1"
            ) as refusal:
                await pushes._push(plan, 2, False)
            assert refusal.value.refused
            assert same(pushes.targets[1].tensors, held)
            assert (await pushes.publish(2, quiet)).nbytes == pushes.full.nbytes
            assert same(pushes.targets[0].tensors, pushes.truth)
            assert same(pushes.targets[1].tensors, pushes.truth)
            pushes.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_what_was_pushed_as_the_committed_version_is_never_forgotten_for_a_stale_one() -> None:
    """Weights that are offered under a number that is not newer would stand in for what receivers hold."""

    async def run() -> None:
        async with Coordinator(DEADLINE_S) as coordinator:
            pushes = Pushes(coordinator, 0)
            pushes.change([])
            await pushes.publish(1, Step([], "", True, False))
            pushes.change([("up", 1)])
            with pytest.raises(ValueError, match="not newer than 1"):
                pushes.senders[0].changes(pushes.sources[0], pushes.full, 1, 1)
            pushes.base = 1
            assert (await pushes.publish(2, Step([], "", True, False))).nbytes > 0
            assert same(pushes.targets[0].tensors, pushes.truth)
            pushes.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_deltas_take_no_more_memory_from_push_to_push() -> None:
    """Steps of deltas are not kept, and neither are versions before the last two."""

    async def run() -> None:
        async with Coordinator(DEADLINE_S) as coordinator:
            pushes = Pushes(coordinator, 0)
            pushes.change([])
            for version in range(6):
                pushes.change([("up", version), ("head", version)])
                await pushes.publish(version, Step([], "", True, False))
                pushes.base = version
            for rank in RANKS:
                assert len(pushes.senders[rank]._held) <= 2
                assert len(pushes.senders[rank]._compiled._known) == 1
                assert len(pushes.senders[rank]._scans._known) == 1
                assert len(pushes.receivers[rank]._compiled._known) == 1
            pushes.close()

    asyncio.run(asyncio.wait_for(run(), 60))
