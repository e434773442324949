"""A publish succeeds only if the engine serves what was pushed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from k2rl.checkpoint_engine.messages import RECEIVER, Address, Peer
from k2rl.checkpoint_engine.publisher import Publisher
from k2rl.checkpoint_engine.push import Invitations, PushReport
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import TensorSource
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig
from k2rl.inference.engine import EngineDeadError
from k2rl.inference.vllm import VLLMEngine


class Engine:
    """Takes a push, and then says what `outcome` is."""

    receivers = (0,)

    def __init__(self, outcome: BaseException | None, joins: bool = True) -> None:
        self.tensors = {"a": torch.zeros(3)}
        self._outcome, self._joins = outcome, joins

    async def join_push(self, address: Address, version: int, deadline_s: float) -> Invitations:
        if not self._joins:
            raise ValueError("the engine sleeps")
        receiver = Receiver(0, TensorTarget(self.tensors))
        return {Peer(RECEIVER, 0): asyncio.to_thread(receiver.receive, address, deadline_s)}

    async def push_settled(self) -> BaseException | None:
        return self._outcome


def publish(engine: Engine) -> PushReport:
    async def run() -> PushReport:
        publisher = Publisher(engine, CheckpointEngineConfig(), {"a": ("float32", (3,))})
        await publisher.start()
        try:
            source = TensorSource([("a", torch.ones(3))], 0)
            call: Callable[..., Awaitable[Any]] = asyncio.to_thread
            return await publisher.publish(source, 1, call)
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
    with pytest.raises(EngineDeadError, match="gone"):
        publish(Engine(EngineDeadError("gone"), joins=False))
    with pytest.raises((PushError, ValueError), match="sleeps"):
        publish(Engine(RuntimeError("the push failed"), joins=False))


def test_an_engine_that_hangs_in_a_push_is_dead_at_the_deadline() -> None:
    """A stopped worker keeps vLLM's own call waiting for ever."""

    async def run() -> None:
        engine = VLLMEngine.__new__(VLLMEngine)
        engine._push, engine._settle_s = asyncio.ensure_future(asyncio.Event().wait()), 0.1
        assert isinstance(await engine.push_settled(), EngineDeadError)

    asyncio.run(asyncio.wait_for(run(), 20))
