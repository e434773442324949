"""New or restarted engines get the committed version from whoever holds it, without the trainer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from k2rl.checkpoint_engine.arena import Arena, ArenaLostError
from k2rl.checkpoint_engine.manifest import merge
from k2rl.checkpoint_engine.messages import AGENT, RECEIVER, SENDER, Peer
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.transaction import PushError
from tests import netns
from tests.checkpoint_engine.parts import BUCKET_BYTES, Cluster, Fault, cluster

SHORT_DEADLINE_S = 2.0
KILL: Fault = ("kill", 1)


def with_cluster(
    test: Callable[[Cluster], Awaitable[None]],
    hosts: int = 2,
    spare: int = 1,
    slots: int = 0,
    deadline_s: float = 30.0,
    places: Sequence[netns.Host] = (),
) -> None:
    async def run() -> None:
        async with cluster(deadline_s, slots, hosts, spare, places) as parts:
            await test(parts)

    asyncio.run(run())


def shared_memory_files() -> list[Path]:
    return [path for path in Path("/dev/shm").iterdir() if "k2rl" in path.name]


async def brought(parts: Cluster, version: int, *ranks: int) -> None:
    """Join, and look at what is in place; no memory of failed attempts is kept."""
    report = await parts.join(*ranks)
    assert report.version == version
    for rank in ranks:
        assert await parts.holds(rank, version)
    for agent in parts.agents.values():
        if agent.process.is_alive():
            assert len(await agent.ask("arenas")) <= 1
    assert not shared_memory_files()


async def join_after_faults(parts: Cluster) -> None:
    """Host 2 joins hosts 0 and 1: what goes wrong is named, and the next source or the next join heals."""
    await parts.push(1)
    await parts.push(2)
    for part in parts.senders.values():
        part.end()

    with pytest.raises(PushError, match="receiver 2") as caught:
        await parts.join(2, receiver_faults={2: KILL})
    assert caught.value.culprit == Peer(RECEIVER, 2)
    parts.restart(RECEIVER, 2)
    assert parts.asked_agents == [0, 2]

    with pytest.raises(PushError, match="host agent 2"):
        await parts.join(2, agent_faults={2: KILL})
    assert parts.asked_agents == [0, 2], "another source would not help"
    parts.restart(AGENT, 2)

    with pytest.raises(PushError, match="arrived corrupted on host 2.*host 0.*arrived corrupted.*host 1"):
        await parts.join(2, agent_faults={0: ("flip", 1), 1: ("flip", 0)})
    assert parts.asked_agents == [0, 2, 1, 2]
    assert (await parts.state(2))[0] is None

    assert (await parts.join(2, agent_faults={0: KILL})).version == 2
    assert parts.asked_agents == [0, 2, 1, 2], "the next source, in the same call"
    assert await parts.holds(2, 2)
    assert await parts.holds(0, 2)
    assert await parts.holds(1, 2)


def test_a_receiver_joins_on_a_host_that_had_no_part_in_the_push() -> None:
    async def test(parts: Cluster) -> None:
        await join_after_faults(parts)
        # It holds the version now, like the others.
        parts.restart(RECEIVER, 2)
        await brought(parts, 2, 2)
        assert parts.asked_agents == []
        # Agent 0 is dead, and its host's receiver has the arena open still.
        parts.restart(AGENT, 0)
        parts.restart(RECEIVER, 2)
        await brought(parts, 2, 2, 3, 4)
        assert parts.asked_agents == [0, 3, 4], "one that holds it already, and two that do not"
        for host in (0, 1):
            parts.agents[host].end()
        await brought(parts, 2, 5)
        assert parts.asked_agents == [0, 5, 1, 5, 2, 5]
        # The next push is for all.
        for rank in parts.senders:
            parts.restart(SENDER, rank)
            parts.restart(AGENT, rank)
        parts.reached = parts.host_of
        manifest = merge([part.ready for part in parts.senders.values()])
        parts.plan = plan_push(manifest, tuple(parts.reached), bucket_bytes=BUCKET_BYTES)
        await parts.push(3)
        for rank in parts.receivers:
            assert await parts.holds(rank, 3)

    with_cluster(test, spare=4)


@pytest.mark.skipif(
    not netns.available() and not os.environ.get("CI"), reason="network namespaces need root and iproute2"
)
def test_a_receiver_joins_on_a_host_with_a_network_of_its_own() -> None:
    def run(places: Sequence[netns.Host]) -> None:
        places[0].enter()
        with_cluster(join_after_faults, places=places)

    # Started by the thread that enters a host, the server would fork the parts of all later tests there.
    forkserver.ensure_running()
    with netns.network(3) as places, ThreadPoolExecutor(1) as thread:
        thread.submit(run, places).result()


def test_a_receiver_that_has_the_version_joins_beside_one_that_has_lost_it() -> None:
    """Ranks of one engine, of which a push has reached one alone."""

    async def test(parts: Cluster) -> None:
        await parts.push(1)
        for _ in range(2):
            parts.restart(RECEIVER, 2)
            await brought(parts, 1, 1, 2)

    with_cluster(test)


def test_a_source_that_hangs_is_given_up_at_the_deadline() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        assert (await parts.join(2, agent_faults={0: ("stop", 1)})).version == 1
        assert parts.asked_agents == [0, 2, 1, 2]
        assert await parts.holds(2, 1)
        # Its successor and the agent that had no trouble meet anew.
        parts.restart(AGENT, 0)
        await parts.push(2)
        assert await parts.holds(0, 2)
        assert await parts.holds(1, 2)

    with_cluster(test, deadline_s=SHORT_DEADLINE_S)


def test_what_the_coordinators_host_holds_is_brought_to_another() -> None:
    """The trainer pushes on its own host, with no agent; the only source dies, and the next join heals."""

    async def test(parts: Cluster) -> None:
        await parts.push(1)
        with pytest.raises(PushError, match=r"cannot be brought to hosts \[1\]: from host 0: host agent 0"):
            await parts.join(2, agent_faults={0: KILL})
        parts.restart(AGENT, 0)
        await brought(parts, 1, 2)

    with_cluster(test, hosts=1)


def test_after_a_delta_a_host_is_brought_the_whole_version() -> None:
    """Compared with what the delta has made of the digests of the version before."""

    async def test(parts: Cluster) -> None:
        await parts.push(1000)
        await parts.push(1001, base=1000)
        with pytest.raises(PushError, match="arrived corrupted on host 2.*host 0.*arrived corrupted.*host 1"):
            await parts.join(2, agent_faults={0: ("flip", 1), 1: ("flip", 0)})
        await brought(parts, 1001, 2)
        # And from the new host, once the others have lost it.
        for host in (0, 1):
            parts.restart(AGENT, host)
            parts.restart(RECEIVER, host)
        with pytest.raises(PushError, match="receiver 0 failed: ArenaLostError"):
            await parts.join(0)
        await brought(parts, 1001, 0)
        assert parts.asked_agents[-2:] == [2, 0]

    with_cluster(test)


def test_a_host_that_has_lost_its_arena_gets_it_again() -> None:
    async def test(parts: Cluster) -> None:
        await parts.push(1)
        parts.restart(AGENT, 1)
        parts.restart(RECEIVER, 1)
        with pytest.raises(PushError, match="receiver 1 failed: ArenaLostError: cannot map the weights"):
            await parts.join(1)
        await brought(parts, 1, 1)
        # And as a source: it is left out from then on.
        parts.restart(AGENT, 0)
        parts.restart(RECEIVER, 0)
        assert (await parts.join(2)).version == 1
        assert parts.asked_agents == [0, 2, 1, 2]
        await brought(parts, 1, 0)
        assert parts.asked_agents == [1, 0]

    with_cluster(test)


def test_a_join_that_cannot_be_says_what_to_do() -> None:
    async def ring(parts: Cluster) -> None:
        await parts.push(1)
        with pytest.raises(ValueError, match="wait for the next push, or set checkpoint_engine.memory_mib=0"):
            await parts.join(1)

    async def no_agents(parts: Cluster) -> None:
        with pytest.raises(ValueError, match="no committed version"):
            await parts.join(1)
        await parts.push(1)
        with pytest.raises(ValueError, match=r"hosts \[7\] do not hold the version, and no agents"):
            await parts.coordinator.join({1: 7})

    with_cluster(ring, hosts=1, spare=0, slots=2)
    with_cluster(no_agents, hosts=1, spare=0)


def test_nobody_keeps_an_arena_that_was_replaced() -> None:
    async def test(parts: Cluster) -> None:
        members = (*parts.senders.values(), *parts.receivers.values())
        await parts.push(1)
        small = [await part.ask("arenas") for part in members]
        manifest = merge([part.ready for part in parts.senders.values()])
        parts.plan = plan_push(manifest, tuple(parts.reached), bucket_bytes=BUCKET_BYTES)
        await parts.push(2)
        large = [await part.ask("arenas") for part in members]
        assert all(len(names) == 1 for names in small + large)
        assert small != large

    with_cluster(test, hosts=1, spare=0, slots=2)


def test_a_path_that_leads_to_something_else_by_now_is_passed_over(tmp_path: Path) -> None:
    """As when a process id was used again."""
    arena, other = Arena.create(4096), Arena.create(4096)
    arena.memory[:] = 7
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / f"memfd:{arena.name}"
    file.write_bytes(bytes(4096))
    os.mkfifo(pipe)
    link.symlink_to(file)
    wrong = [other.path, str(file), str(pipe), str(link), str(tmp_path / "gone"), "/proc/1/fd/99999"]
    opened = Arena.open([*wrong, arena.path], arena.name, writable=False)
    assert bool((opened.memory == 7).all())
    path = arena.path
    arena.close()
    again = Arena.open([path, *wrong, opened.path], opened.name, writable=True)
    assert torch.equal(again.memory, opened.memory)
    with pytest.raises(ArenaLostError, match=f"{other.path} leads to .* by now, and not to {opened.name}"):
        Arena.open(wrong, opened.name, writable=True)
    with pytest.raises(ArenaLostError, match="no path was given"):
        Arena.open([], opened.name, writable=True)
    for mapping in (other, opened, again):
        mapping.close()
