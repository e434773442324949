"""One publisher for trainer ranks and engines on several hosts, and engines that join it later."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from k2rl.checkpoint_engine.messages import AGENT, Peer
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.inference.engine import EngineDeadError
from tests.checkpoint_engine.parts import weights
from tests.checkpoint_engine.publishing import Group, with_group

KILL = ("kill", 0)
#: Trainer ranks on hosts 0 and 1, engines on 1 and 2; an agent of each host.
SPREAD = {"hosts": (0, 1, 1, 2), "agents": (0, 1, 2)}
WHOLE = sum(tensor.nbytes for tensor in weights(1001).values())


@pytest.mark.parametrize("memory_mib", [0, 0.1])
def test_ranks_and_engines_on_three_hosts(memory_mib: float) -> None:
    """A dead agent is named; its successor makes the next push whole."""

    async def test(everything: Group) -> None:
        for version in (1, 2):
            await everything.push(version)
            assert await everything.first.holds(version)
            assert await everything.second.holds(version)
        everything.agent_faults[1] = KILL
        with pytest.raises(PushError, match="host agent 1 .*(died|failed)") as caught:
            await everything.push(3)
        assert caught.value.culprit == Peer(AGENT, 1)
        assert everything.publisher.engines.keys() == {"first", "second"}
        everything.restart_agent(1)
        await everything.push(3)
        assert await everything.first.holds(3)
        assert await everything.second.holds(3)

    with_group(test, memory_mib=memory_mib, **SPREAD)


@pytest.mark.parametrize("host", [0, 1, 3], ids=["a trainer's host", "an engine's host", "a new host"])
def test_an_engine_joins_without_the_trainer_and_without_the_others(host: int) -> None:
    async def test(everything: Group) -> None:
        await everything.push(1)
        for part in everything.senders:
            part.end()
        everything.first.end()
        fresh = everything.engine(host)
        assert (await everything.publisher.join("first", fresh)).version == 1
        assert await fresh.holds(1)
        assert everything.publisher.engines == {"first": fresh, "second": everything.second}
        assert everything.second.joined == 1

    with_group(test, hosts=(0, 1, 1, 2), agents=(0, 1, 2, 3))


def test_deltas_reach_all_hosts_and_build_on_what_engines_have_joined_at() -> None:
    async def test(everything: Group) -> None:
        await everything.push(1001)
        assert (await everything.push(1002, KILL)).nbytes < WHOLE / 2, "rank 1 has nothing to send"
        everything.first.end()
        everything.first = everything.engine(0)
        await everything.publisher.join("first", everything.first)
        assert await everything.first.holds(1002)
        assert (await everything.push(1003, KILL)).nbytes < WHOLE / 2
        assert await everything.first.holds(1003)
        assert await everything.second.holds(1003)
        everything.restart_agent(0)
        assert (await everything.push(1004)).nbytes == WHOLE, "its arena does not hold what deltas build on"
        third = everything.engine(2)
        await everything.publisher.join("third", third)
        assert (await everything.push(1005)).nbytes == WHOLE, "another plan, for another number of engines"
        assert (await everything.push(1006, KILL)).nbytes < WHOLE / 2
        for engine in (everything.first, everything.second, third):
            assert await engine.holds(1006)

    with_group(test, strategy="delta", **SPREAD)


def test_a_join_that_fails_concerns_nobody_else() -> None:
    async def test(everything: Group) -> None:
        await everything.push(1)
        fresh = everything.engine()
        fresh.fault = ("raise", 0)
        with pytest.raises(PushError, match="^new: receiver 1 failed: RuntimeError: out of luck"):
            await everything.publisher.join("new", fresh)
        fresh.fault = KILL
        with pytest.raises(
            EngineDeadError, match="^new: a worker died; new: receiver 1 .*died|^new: a worker"
        ):
            await everything.publisher.join("new", fresh)
        assert everything.publisher.engines.keys() == {"first", "second"}
        fresh = everything.engine()
        await everything.publisher.join("new", fresh)
        assert await fresh.holds(1)
        await everything.push(2)
        for engine in (everything.first, everything.second, fresh):
            assert await engine.holds(2)
        assert everything.first.joined == 2

    with_group(test)


def test_one_push_at_a_time_and_joins_take_turns_with_it() -> None:
    async def test(everything: Group) -> None:
        await everything.push(1)
        everything.first.pauses = False
        pushing = asyncio.ensure_future(everything.push(2))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="a push of version 2 is under way: wait until it has ended"):
            await everything.push(3)
        fresh = everything.engine()
        joining = asyncio.ensure_future(everything.publisher.join("new", fresh))
        pushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pushing
        everything.first.pauses = True
        pushing = asyncio.ensure_future(everything.push(2))
        assert (await joining).version == 1
        await pushing
        for engine in (everything.first, everything.second, fresh):
            assert await engine.holds(2)
        assert fresh.joined == 2

    with_group(test)


def test_what_cannot_be_is_said_before_anything_moves() -> None:
    async def test(everything: Group) -> None:
        with pytest.raises(ValueError, match="no committed version is there"):
            await everything.publisher.join("new", everything.engine())
        await everything.push(1)
        far = everything.engine(7)
        with pytest.raises(ValueError, match=r"hosts \[.*7\] have no agent"):
            await everything.publisher.join("far", far)
        everything.publisher.engines["far"] = far
        with pytest.raises(ValueError, match=r"hosts \[.*7\] have no agent"):
            await everything.push(2)
        del everything.publisher.engines["far"]
        await everything.push(2)
        assert await everything.second.holds(2)

    with_group(test)
    with_group(test, hosts=(0, 0, 0, 0), agents=(0,))
    assert not [path for path in Path("/dev/shm").iterdir() if "k2rl" in path.name]
