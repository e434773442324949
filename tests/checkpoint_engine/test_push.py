"""Pushes between real processes: what arrives, and what happens when somebody dies, hangs, raises or lies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import torch

from k2rl.checkpoint_engine.manifest import merge
from k2rl.checkpoint_engine.messages import AGENT, RECEIVER, SENDER, Peer, TransferError
from k2rl.checkpoint_engine.plan import Box, plan_push
from k2rl.checkpoint_engine.transaction import PushError
from tests.checkpoint_engine.parts import (
    BEFORE,
    BUCKET_BYTES,
    SHAPES,
    Cluster,
    Fault,
    Part,
    cluster,
    serve_coordinator,
    serve_sender,
    weights,
)

#: For parts that hang: long enough for a busy machine, short enough to wait for.
SHORT_DEADLINE_S = 2.0
SHARED_MEMORY = Path("/dev/shm")


def _segments() -> set[Path]:
    """Those of this project: other tests run beside this one."""
    return {path for path in SHARED_MEMORY.iterdir() if "k2rl" in path.name}


def with_cluster(
    test: Callable[[Cluster], Awaitable[None]], deadline_s: float = 30.0, slots: int = 0, hosts: int = 1
) -> None:
    async def run() -> None:
        async with cluster(deadline_s, slots, hosts) as parts:
            await test(parts)

    before = _segments()
    asyncio.run(run())
    assert _segments() <= before


@pytest.mark.parametrize("slots", [0, 2, 3])
def test_every_version_arrives_whole(slots: int) -> None:
    async def test(parts: Cluster) -> None:
        assert len(parts.plan.buckets) > 3
        for version in (1, 2, 5):
            report = await parts.push(version)
            assert (report.version, report.nbytes) == (version, parts.plan.nbytes)
            assert await parts.holds(0, version)
            assert await parts.holds(1, version)

    with_cluster(test, slots=slots)


def test_versions_only_grow_and_pushes_take_turns() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(3)
        for stale in (3, 2):
            with pytest.raises(ValueError, match="not newer than 3"):
                await parts.push(stale)
        first = asyncio.ensure_future(parts.push(4))
        await asyncio.sleep(0)  # let it take its turn
        with pytest.raises(ValueError, match="under way"):
            await parts.push(5)
        await first
        assert await parts.holds(0, 4)

    with_cluster(test)


async def _fails_names_and_heals(parts: Cluster, culprit: Peer, fault: Fault, reason: str) -> None:
    """A push after a good one fails because of `culprit`; then the next two pushes succeed."""
    await parts.push(1)
    of_senders = {culprit.rank: fault} if culprit.role == SENDER else {}
    of_receivers = {culprit.rank: fault} if culprit.role == RECEIVER else {}
    of_agents = {culprit.rank: fault} if culprit.role == AGENT else {}
    with pytest.raises(PushError, match=reason) as caught:
        await parts.push(2, of_senders, of_receivers, of_agents)
    assert caught.value.culprit == culprit
    assert str(culprit) in str(caught.value)
    assert parts.coordinator.version == 1
    for rank in parts.receivers:
        if Peer(RECEIVER, rank) != culprit or fault[0] == "raise":
            # Untouched, or known to hold nothing that may be served: never something in between.
            assert await parts.holds(rank, 1) or (await parts.state(rank))[0] is None
    if fault[0] != "raise":
        parts.restart(culprit.role, culprit.rank)
    for version in (2, 3):
        await parts.push(version)
        for rank in parts.receivers:
            assert await parts.holds(rank, version)


@pytest.mark.parametrize(
    ("rank", "at"),
    [(0, 0), (1, 0), (0, 2), (1, 2), (1, BEFORE), (0, 0.5)],
    ids=["first bucket, 0", "first bucket, 1", "later bucket, 0", "later bucket, 1", "before", "in a bucket"],
)
@pytest.mark.parametrize("role", [SENDER, RECEIVER])
def test_a_killed_part_is_named_at_once_and_the_next_push_heals(role: str, rank: int, at: float) -> None:
    with_cluster(lambda parts: _fails_names_and_heals(parts, Peer(role, rank), ("kill", at), "died|failed"))


@pytest.mark.parametrize("role", [SENDER, RECEIVER])
def test_a_stopped_part_is_named_at_the_deadline(role: str) -> None:
    with_cluster(
        lambda parts: _fails_names_and_heals(
            parts, Peer(role, 1), ("stop", 1), "did not come to (fill|apply)"
        ),
        deadline_s=SHORT_DEADLINE_S,
    )


@pytest.mark.parametrize("role", [SENDER, RECEIVER])
def test_an_exception_in_one_part_says_what_it_was(role: str) -> None:
    with_cluster(lambda parts: _fails_names_and_heals(parts, Peer(role, 1), ("raise", 1), "out of luck"))


def test_a_receiver_that_dies_while_finishing_keeps_all_from_committing() -> None:
    async def test(parts: Cluster) -> None:
        # One step a bucket, and then `finish`.
        after_all_buckets = ("kill", len(parts.plan.buckets))
        await _fails_names_and_heals(parts, Peer(RECEIVER, 0), after_all_buckets, "died|failed")

    with_cluster(test)


def test_a_trainer_that_dies_after_its_last_bucket_is_not_missed() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        await parts.push(2, before_delivery=parts.senders[1].end)
        for rank in parts.receivers:
            assert await parts.holds(rank, 2)
        parts.restart(SENDER, 1)
        await parts.push(3)
        assert await parts.holds(1, 3)

    with_cluster(test)


def test_a_byte_that_changes_between_hosts_is_found_before_anything_is_committed() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        with pytest.raises(PushError, match="receiver . failed: .*bucket 1 arrived corrupted: not the bytes"):
            await parts.push(2, agent_faults={1: ("flip", 1)})
        for rank in parts.receivers:
            assert await parts.holds(rank, 1) or (await parts.state(rank))[0] is None
        for version in (2, 3):
            await parts.push(version)
            for rank in parts.receivers:
                assert await parts.holds(rank, version)

    with_cluster(test, hosts=3)


def test_a_corrupted_byte_is_found_before_anything_is_committed() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)

        def flip() -> None:
            arena, base = parts.coordinator.arena.being_written
            arena.memory[base + parts.plan.buckets[1].offset + 7] ^= 1

        with pytest.raises(PushError, match=r"bucket 1 arrived corrupted: not the bytes that trainer rank 0"):
            await parts.push(2, before_delivery=flip)
        versions = [(await parts.state(rank))[0] for rank in parts.receivers]
        # One found it; the other may not have begun, and then still has what it had.
        assert None in versions
        assert all([version is None or await parts.holds(rank, 1) for rank, version in enumerate(versions)])
        await parts.push(3)
        assert await parts.holds(0, 3)
        assert await parts.holds(1, 3)

    with_cluster(test)


def test_a_trainer_that_dies_while_filling_leaves_the_engines_as_they_were() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        with pytest.raises(PushError, match="trainer rank 0"):
            await parts.push(2, {0: ("kill", 1)})
        assert await parts.holds(0, 1)
        assert await parts.holds(1, 1)

    with_cluster(test)


def test_a_restarted_receiver_joins_without_the_trainer_or_the_others() -> None:
    async def test(parts: Cluster) -> None:
        for version in (1, 2):
            await parts.push(version)
        with pytest.raises(PushError):
            await parts.push(3, {1: ("kill", 1)})
        for part in parts.senders.values():
            part.end()
        parts.restart(RECEIVER, 1)
        report = await parts.join(1)
        assert report.version == 2
        assert await parts.holds(1, 2)
        assert await parts.holds(0, 2)

    with_cluster(test)


def test_a_stopped_trainer_that_goes_on_later_does_not_write_into_the_next_push() -> None:
    """It is in the middle of a bucket, and a new process has its place."""

    async def test(parts: Cluster) -> None:
        await parts.push(1)
        with pytest.raises(PushError, match="trainer rank 1"):
            await parts.push(2, {1: ("stop", 0)})
        late = parts.senders[1]
        parts.senders[1] = Part(serve_sender, 1, 2, 0)

        def wake() -> None:
            assert late.process.pid is not None
            os.kill(late.process.pid, signal.SIGCONT)
            # It has copied its bucket, and learnt from the closed connection that it is late.
            assert isinstance(late.asked_last.exception(10), TransferError)

        try:
            await parts.push(3, before_delivery=wake)
            assert await parts.holds(0, 3)
            assert await parts.holds(1, 3)
        finally:
            late.end()

    with_cluster(test, deadline_s=SHORT_DEADLINE_S)


def test_a_killed_coordinator_ends_the_trainers_push_and_leaves_nothing_behind() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        before = _segments()
        coordinator = Part(serve_coordinator, parts.plan)
        calls = [
            asyncio.ensure_future(part.ask((coordinator.ready, 2, None, 30.0)))
            for part in parts.senders.values()
        ]
        assert await asyncio.to_thread(coordinator.listen) == "staged"
        coordinator.end()
        for call in calls:
            with pytest.raises(TransferError, match="coordinator"):
                await call
        assert _segments() <= before
        await parts.push(2)
        assert await parts.holds(0, 2)

    with_cluster(test)


def test_nothing_grows_over_many_pushes() -> None:
    """100 pushes of everything, 100 of what changed: no memory, file descriptors, shared-memory segments."""

    async def test(parts: Cluster) -> None:
        members = (*parts.senders.values(), *parts.receivers.values())
        processes = [psutil.Process(), *(psutil.Process(part.process.pid) for part in members)]

        def usage() -> tuple[list[int], list[int], set[Path]]:
            memory = [process.memory_full_info().uss for process in processes]
            return [process.num_fds() for process in processes], memory, _segments()

        for version in range(20):
            await parts.push(version)
        fds, memory, segments = usage()
        for version in range(20, 120):
            await parts.push(version)
        assert await parts.holds(0, 119)
        await parts.push(1000)
        for version in range(1001, 1100):
            await parts.push(version, base=version - 1)
        assert await parts.holds(0, 1099)
        fds_after, memory_after, segments_after = usage()
        assert all(after <= before for before, after in zip(fds, fds_after, strict=True))
        assert segments_after <= segments
        for before, after in zip(memory, memory_after, strict=True):
            assert after - before < 4 << 20

    with_cluster(test)


@pytest.mark.parametrize("slots", [0, 3])
def test_every_version_arrives_on_every_host(slots: int) -> None:
    async def test(parts: Cluster) -> None:
        for version in (1, 2, 3):
            await parts.push(version)
            for rank in parts.receivers:
                assert await parts.holds(rank, version)

    with_cluster(test, slots=slots, hosts=3)


@pytest.mark.parametrize(("slots", "hosts"), [(0, 1), (3, 1), (0, 3), (3, 3)])
def test_deltas_bring_what_has_changed(slots: int, hosts: int) -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1000)
        for version in (1001, 1002, 1003):
            report = await parts.push(version, base=version - 1)
            assert 0 < report.nbytes < parts.plan.nbytes / 2
            for rank in parts.receivers:
                assert await parts.holds(rank, version)
        if slots == 0:
            parts.restart(RECEIVER, 1)
            assert (await parts.join(1)).version == 1003
            assert await parts.holds(1, 1003)
        await parts.push(1004, base=1003)
        for rank in parts.receivers:
            assert await parts.holds(rank, 1004)

    with_cluster(test, slots=slots, hosts=hosts)


@pytest.mark.parametrize("culprit", [Peer(SENDER, 1), Peer(RECEIVER, 1), Peer(AGENT, 1)], ids=str)
def test_a_part_that_dies_in_a_delta_costs_a_push_of_everything(culprit: Peer) -> None:
    """And the version before it is still whole for those who join."""

    async def test(parts: Cluster) -> None:
        kill = {culprit.rank: ("kill", 0)}
        await parts.push(1000)
        await parts.push(1001, base=1000)
        with pytest.raises(PushError) as caught:
            await parts.push(
                1040,  # rows of both trainer ranks
                kill if culprit.role == SENDER else {},
                kill if culprit.role == RECEIVER else {},
                kill if culprit.role == AGENT else {},
                base=1001,
            )
        assert caught.value.culprit == culprit
        parts.restart(culprit.role, culprit.rank)
        if culprit.role == RECEIVER:
            assert (await parts.join(1)).version == 1001
            assert await parts.holds(1, 1001)
        if culprit.role == SENDER:
            # It has forgotten what it sent: all of its rows have changed, which is more than a delta.
            assert (await parts.push(1041, base=1001)).nbytes > parts.plan.nbytes / 4
        else:
            await parts.push(1041)
        for rank in parts.receivers:
            assert await parts.holds(rank, 1041)

    with_cluster(test, hosts=1 if culprit.role != AGENT else 2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_killed_host_agent_is_named_and_the_next_push_heals(rank: int) -> None:
    with_cluster(lambda parts: _fails_names_and_heals(parts, Peer(AGENT, rank), ("kill", 1), "host"), hosts=3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_host_agent_is_named_at_the_deadline(rank: int) -> None:
    with_cluster(
        lambda parts: _fails_names_and_heals(parts, Peer(AGENT, rank), ("stop", 1), "host"),
        deadline_s=SHORT_DEADLINE_S,
        hosts=3,
    )


def test_a_receiver_joins_at_its_own_host_without_the_trainer() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        for part in parts.senders.values():
            part.end()
        parts.restart(RECEIVER, 1)
        assert (await parts.join(1)).version == 1
        assert await parts.holds(1, 1)

    with_cluster(test, hosts=2)


def test_receivers_that_need_shares_get_their_shares() -> None:
    """Receiver 0 needs columns of matrices, receiver 1 rows; what neither shards, both need whole."""

    async def test(parts: Cluster) -> None:
        def share(receiver: int, shape: tuple[int, ...]) -> Box:
            box = [(0, length) for length in shape]
            if len(shape) > 1 and shape[0] > 1:
                dimension = 1 - receiver
                box[dimension] = (shape[dimension] // 3, shape[dimension])
            return tuple(box)

        boxes = {r: {name: share(r, shape) for name, shape in SHAPES.items()} for r in (0, 1)}
        needs = {r: {name: [box] for name, box in wanted.items()} for r, wanted in boxes.items()}
        manifest = merge([part.ready for part in parts.senders.values()])
        parts.plan = plan_push(manifest, (0, 1), bucket_bytes=BUCKET_BYTES, needs=needs)
        assert parts.plan.strategy == "shard_aware"
        assert parts.plan.nbytes < 2 * manifest.nbytes
        await parts.push(1)
        for receiver, wanted in boxes.items():
            _, found, _ = await parts.state(receiver)
            for name, tensor in weights(1).items():
                cut = tuple(slice(*ends) for ends in wanted[name])
                expected = torch.zeros(tensor.shape)
                expected[cut] = tensor.float()[cut]
                assert torch.equal(torch.tensor(found[name]), expected), name

    with_cluster(test)
