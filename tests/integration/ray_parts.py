"""Trainer ranks, engines and host agents as Ray actors, small as can be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError

from k2rl.checkpoint_engine.agent import HostAgent
from k2rl.checkpoint_engine.messages import RECEIVER, Address, Peer
from k2rl.checkpoint_engine.plan import Needs, Plan, Rows
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.inference.engine import EngineDeadError

#: What the model takes.
EXPECTED = dict.fromkeys("ab", ("float32", (1000,)))


class Started:
    """An actor that says when it is there: importing takes longer than a push waits."""

    async def started(self) -> None:
        pass


class RankActor(Started):
    """A trainer rank that holds one of the two tensors."""

    def __init__(self, rank: int, host: int) -> None:
        self._sender = Sender(rank, host)
        self._tensor = torch.zeros(1000)
        self._source = TensorSource([("ab"[rank], self._tensor)], rank)

    async def manifest(self) -> Any:
        return self._source.manifest

    async def train(self, step: int) -> None:
        self._tensor.fill_(step)

    async def send(self, address: Address, deadline_s: float) -> int:
        return await asyncio.to_thread(self._sender.send, self._source, address, deadline_s)

    async def changes(self, plan: Plan, base: int, version: int) -> Rows:
        return await asyncio.to_thread(self._sender.changes, self._source, plan, base, version)


class EngineActor(Started):
    """An engine of one worker."""

    def __init__(self, host: int) -> None:
        self._tensors = {name: torch.zeros(1000) for name in EXPECTED}
        self._receiver = Receiver(0, TensorTarget(self._tensors), host)
        self._push: asyncio.Future[int] | None = None

    async def join_push(self, address: Address, version: int, deadline_s: float, first_receiver: int) -> None:
        self._receiver.peer = Peer(RECEIVER, first_receiver)
        self._push = asyncio.ensure_future(asyncio.to_thread(self._receiver.receive, address, deadline_s))

    async def push_ended(self) -> None:
        if self._push is not None:
            await asyncio.shield(self._push)

    async def push_settled(self) -> BaseException | None:
        push, self._push = self._push, None
        return (await asyncio.gather(push, return_exceptions=True))[0] if push else None

    async def holds(self) -> tuple[int | None, list[float]]:
        return self._receiver.version, [float(tensor.mean()) for tensor in self._tensors.values()]


class AgentActor(Started):
    """A host's agent."""

    def __init__(self, host: int) -> None:
        self._agent = HostAgent(host)

    async def take_part(self, address: Address, deadline_s: float) -> int:
        return await asyncio.to_thread(self._agent.take_part, address, deadline_s)


class RemoteEngine:
    """What the publisher sees of an engine's actor."""

    num_receivers = 1
    needs: Sequence[Needs] | None = None

    def __init__(self, host: int) -> None:
        self.host = host
        self.actor = start(EngineActor, host)

    async def join_push(self, *arguments: Any) -> None:
        await self._call(self.actor.join_push.remote(*arguments))

    async def push_ended(self) -> None:
        await self._call(self.actor.push_ended.remote())

    async def push_settled(self) -> BaseException | None:
        outcome = await self._call(self.actor.push_settled.remote())
        return outcome if isinstance(outcome, BaseException) else None

    async def _call(self, answer: Any) -> Any:
        try:
            return await answer
        except RayActorError as error:
            raise EngineDeadError(f"its actor died: {error}") from error


def start(actor: type[Started], *arguments: Any) -> Any:
    return ray.remote(actor).options(num_cpus=0, max_concurrency=16).remote(*arguments)
