"""A publish succeeds only if all engines serve what was pushed; whoever is at fault is named."""

from __future__ import annotations

import asyncio

import pytest
import torch

from k2rl.checkpoint_engine.cells import CELL_BYTES
from k2rl.checkpoint_engine.messages import RECEIVER, SENDER, Address, Peer
from k2rl.checkpoint_engine.publisher import Publisher, local_rank
from k2rl.checkpoint_engine.push import PushReport
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig
from k2rl.inference.engine import EngineDeadError
from k2rl.inference.vllm import VLLMEngine
from tests.checkpoint_engine.parts import (
    SHAPES,
    Part,
    weights,
)
from tests.checkpoint_engine.publishing import Group, serve_worker, with_group


class Engine:
    """Takes a push, and then says what `outcome` is."""

    host = 0
    num_receivers = 1
    needs = None

    def __init__(self, outcome: BaseException | None, joins: bool = True) -> None:
        self.tensors = {"a": torch.zeros(3)}
        self._outcome, self._joins = outcome, joins
        self.restart()

    def restart(self) -> None:
        self.receiver = Receiver(0, TensorTarget(self.tensors))

    async def join_push(self, address: Address, version: int, deadline_s: float, first: int) -> None:
        if not self._joins:
            raise ValueError("the engine sleeps")
        self.receiver.peer = Peer(RECEIVER, first)
        self._push = asyncio.ensure_future(asyncio.to_thread(self.receiver.receive, address, deadline_s))

    async def push_ended(self) -> None:
        await asyncio.shield(self._push)

    async def push_settled(self) -> BaseException | None:
        return self._outcome


def publish(engine: Engine) -> PushReport:
    async def run() -> PushReport:
        publisher = Publisher({"it": engine}, CheckpointEngineConfig(), {"a": ("float32", (3,))})
        await publisher.start()
        try:
            rank = local_rank(Sender(0), TensorSource([("a", torch.ones(3))], 0), asyncio.to_thread)
            return await publisher.publish({0: rank}, 1)
        finally:
            await publisher.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_publish_brings_the_weights() -> None:
    engine = Engine(None)
    assert publish(engine).version == 1
    assert engine.tensors["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("outcome", [RuntimeError("cannot resume"), EngineDeadError("gone")], ids=repr)
def test_an_engine_that_does_not_serve_a_committed_version_is_an_error(outcome: BaseException) -> None:
    with pytest.raises(type(outcome), match=str(outcome)):
        publish(Engine(outcome))


def test_of_a_failed_push_the_engines_death_is_what_counts() -> None:
    with pytest.raises(EngineDeadError, match="it: gone; it: the engine sleeps"):
        publish(Engine(EngineDeadError("gone"), joins=False))
    with pytest.raises(ValueError, match="it: the engine sleeps"):
        publish(Engine(RuntimeError("the push failed"), joins=False))


@pytest.mark.parametrize("memory_mib", [0, 4])
def test_a_delta_publish_brings_what_changed_or_if_refused_everything(memory_mib: int) -> None:
    rows = 2 * CELL_BYTES // 1024
    engine = Engine(None)
    engine.tensors = {"a": torch.zeros(rows, 256), "b": torch.zeros(rows, 256)}
    engine.restart()
    weights = {name: torch.rand(tensor.shape) for name, tensor in engine.tensors.items()}
    expected = {name: ("float32", tuple(tensor.shape)) for name, tensor in weights.items()}
    whole = sum(tensor.nbytes for tensor in weights.values())
    config = CheckpointEngineConfig(strategy="delta", memory_mib=memory_mib)

    async def run() -> None:
        publisher = Publisher({"it": engine}, config, expected)
        await publisher.start()
        sender = Sender(0)

        async def brings(version: int, nbytes: int) -> None:
            rank = local_rank(sender, TensorSource(weights.items(), 0), asyncio.to_thread)
            report = await publisher.publish({0: rank}, version)
            assert (report.version, report.nbytes) == (version, nbytes)
            assert all(torch.equal(engine.tensors[name], weights[name]) for name in weights)

        try:
            await brings(1, whole)
            await brings(2, 0)
            weights["b"][0, 0] += 1
            await brings(3, CELL_BYTES)
            weights["a"][-1, -1] += 1
            engine.restart()
            await brings(4, whole)
            weights["a"][-1, -1] += 1
            await brings(5, CELL_BYTES)
            weights["a"] += 1
            weights["b"][0] += 1
            await brings(6, whole)
            with pytest.raises(ValueError, match="not newer than 6"):
                await brings(6, whole)
            weights["b"][0] += 1
            await brings(7, CELL_BYTES)
        finally:
            await publisher.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_an_engine_that_hangs_in_a_push_is_dead_at_the_deadline() -> None:
    """A stopped worker keeps vLLM's own call waiting for ever."""

    async def run() -> None:
        engine = VLLMEngine.__new__(VLLMEngine)
        engine._push, engine._settle_s = asyncio.ensure_future(asyncio.Event().wait()), 0.1
        assert isinstance(await engine.push_settled(), EngineDeadError)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_all_ranks_push_into_all_engines() -> None:
    async def test(everything: Group) -> None:
        for version in (1, 2):
            await everything.push(version)
            assert await everything.first.holds(version)
            assert await everything.second.holds(version)

    with_group(test)


def test_deltas_of_all_ranks_reach_all_engines_and_after_any_trouble_everything_does() -> None:
    """The versions differ in rows of trainer rank 0; the other is not even invited, or it would die."""
    last_rank_dies = ("kill", 0)

    async def test(everything: Group) -> None:
        async def brings(version: int, *, delta: bool) -> None:
            report = await everything.push(version, last_rank_dies if delta else None)
            assert (report.nbytes < whole / 2) == delta
            assert await everything.first.holds(version)
            assert await everything.second.holds(version)

        whole = sum(tensor.nbytes for tensor in weights(1001).values())
        await brings(1001, delta=False)
        await brings(1002, delta=True)
        everything.second.fault = ("raise", 0)
        with pytest.raises(PushError, match="^second: receiver 3 failed: RuntimeError: out of luck"):
            await everything.push(1003)
        everything.second.fault = None
        await brings(1003, delta=False)
        await brings(1004, delta=True)
        # Nobody says that the second engine's workers are new: they refuse.
        for part in everything.second.parts:
            part.end()
        everything.second.parts = [Part(serve_worker, 0) for _ in range(2)]
        await brings(1005, delta=False)
        await brings(1006, delta=True)
        for part in everything.first.parts:
            part.end()
        everything.first = everything.publisher.engines["first"] = everything.engine()
        await brings(1007, delta=False)
        del everything.publisher.engines["second"]
        assert (await everything.push(1008)).nbytes == whole
        assert (await everything.push(1009, last_rank_dies)).nbytes < whole / 2
        assert await everything.first.holds(1009)

    with_group(test, strategy="delta")


def test_one_engines_death_is_named_and_the_others_wait_for_the_next_push() -> None:
    async def test(everything: Group) -> None:
        await everything.push(1)
        everything.first.fault = ("kill", 0)
        # Of its two workers, the one that was killed or, on a busy machine, the one that leaves with it.
        with pytest.raises(EngineDeadError, match=r"^first: a worker died; receiver [01] .*died") as caught:
            await everything.push(2)
        assert "second" not in str(caught.value)
        assert set(await everything.second.versions()) <= {1, None}
        await everything.push(2)
        assert await everything.second.holds(2)
        everything.first.parts[0].end()
        everything.first = everything.publisher.engines["first"] = everything.engine()
        await everything.push(3)
        assert await everything.first.holds(3)
        assert await everything.second.holds(3)

    with_group(test)


def test_a_failure_of_one_engine_fences_all_and_the_next_push_heals_all() -> None:
    async def test(everything: Group) -> None:
        await everything.push(1)
        everything.second.fault = ("raise", 0)
        with pytest.raises(
            PushError, match="^second: receiver 3 failed: RuntimeError: out of luck"
        ) as caught:
            await everything.push(2)
        assert caught.value.culprit == Peer(RECEIVER, 3)
        for engine in (everything.first, everything.second):
            assert set(await engine.versions()) <= {1, None}
        everything.second.fault = None
        await everything.push(2)
        assert await everything.first.holds(2)
        assert await everything.second.holds(2)

    with_group(test)


def test_an_engine_that_does_not_pause_is_named_and_left_out() -> None:
    async def test(everything: Group) -> None:
        everything.first.pauses = False
        with pytest.raises(EngineDeadError, match="^first: it does not pause"):
            await everything.push(1)
        await everything.push(1)
        assert await everything.second.holds(1)

    with_group(test, deadline_s=1.0)


def test_a_trainer_that_dies_while_engines_pause_is_the_one_that_is_named() -> None:
    async def test(everything: Group) -> None:
        everything.first.pauses = False
        with pytest.raises(PushError, match="^trainer rank 1.*(died|failed)") as caught:
            await everything.push(1, ("kill", 0))
        assert caught.value.culprit == Peer(SENDER, 1)
        assert everything.publisher.engines.keys() == {"first", "second"}

    with_group(test, memory_mib=0.1)


def test_who_knows_its_needs_gets_them_beside_one_that_does_not() -> None:
    """The second engine reads the first two thirds of each tensor's rows; the first may need everything."""
    shares = {
        name: [((0, -(-shape[0] * 2 // 3)), *((0, length) for length in shape[1:]))] if shape else [()]
        for name, shape in SHAPES.items()
    }

    async def test(everything: Group) -> None:
        await everything.push(1)
        assert await everything.first.holds(1)
        assert await everything.second.versions() == [1, 1]
        _, tensors = await everything.second.parts[0].ask("state")
        for name, tensor in weights(1).items():
            expected = torch.zeros(tensor.shape)
            cut = tuple(slice(*ends) for ends in shares[name][0])
            expected[cut] = tensor.float()[cut]
            assert torch.equal(torch.tensor(tensors[name]), expected), name

    with_group(test, needs=[shares, shares], strategy="shard_aware")
