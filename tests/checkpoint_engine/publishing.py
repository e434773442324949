"""A publisher with two trainer ranks and two engines of two workers each, all of them processes.

They stand for hosts, too: each host has an agent with an arena of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from k2rl.checkpoint_engine.manifest import Manifest
from k2rl.checkpoint_engine.messages import RECEIVER, Address, Peer
from k2rl.checkpoint_engine.plan import Needs, Plan, Rows
from k2rl.checkpoint_engine.publisher import AgentCall, Publisher, TrainerRank
from k2rl.checkpoint_engine.push import PushReport
from k2rl.checkpoint_engine.receiver import Receiver
from k2rl.config import CheckpointEngineConfig
from k2rl.inference.engine import EngineDeadError
from tests.checkpoint_engine.parts import (
    SHAPES,
    Fault,
    FaultyTarget,
    Part,
    Trigger,
    answer_with,
    serve_agent,
    serve_sender,
    weights,
)


def serve_worker(host: int, pipe: Connection) -> None:
    """An inference worker: its number differs from push to push."""
    trigger = Trigger()
    target = FaultyTarget(trigger)
    receiver = Receiver(0, target, host)
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        if job == "state":
            pipe.send((receiver.version, {k: v.float().tolist() for k, v in target.tensors.items()}))
            continue
        number, address, fault, deadline_s = job
        receiver.peer = Peer(RECEIVER, number)
        trigger.arm(fault)
        pipe.send(answer_with(receiver.receive, address, deadline_s))


class ProcessEngine:
    """An engine of two workers, which are processes; `fault` happens in the second."""

    num_receivers = 2

    def __init__(self, needs: Sequence[Needs] | None = None, host: int = 0) -> None:
        self.needs, self.host = needs, host
        self.fault: Fault | None = None
        self.pauses = True
        #: Pushes that it has joined.
        self.joined = 0
        self.parts = [Part(serve_worker, host) for _ in range(self.num_receivers)]
        self._calls: list[asyncio.Future[Any]] = []

    async def join_push(self, address: Address, version: int, deadline_s: float, first: int) -> None:
        if not self.pauses:
            await asyncio.Event().wait()
        self.joined += 1
        jobs = [(first, address, None, deadline_s), (first + 1, address, self.fault, deadline_s)]
        self._calls = [
            asyncio.ensure_future(part.ask(job)) for part, job in zip(self.parts, jobs, strict=True)
        ]

    async def push_ended(self) -> None:
        await asyncio.shield(asyncio.gather(*self._calls))

    async def push_settled(self) -> BaseException | None:
        calls, self._calls = self._calls, []
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        if any(isinstance(outcome, EOFError) for outcome in outcomes):
            return EngineDeadError("a worker died")
        return next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)

    async def versions(self) -> list[int | None]:
        return [(await part.ask("state"))[0] for part in self.parts]

    async def holds(self, version: int) -> bool:
        expected = {name: tensor.float().tolist() for name, tensor in weights(version).items()}
        return [await part.ask("state") for part in self.parts] == [(version, expected)] * 2

    def end(self) -> None:
        for part in self.parts:
            part.end()


class Group:
    """Two trainer ranks, and two engines; in that order on `hosts`."""

    def __init__(
        self,
        needs: Sequence[Needs] | None = None,
        hosts: tuple[int, int, int, int] = (0, 0, 0, 0),
        agents: Sequence[int] = (),
        **config: Any,
    ) -> None:
        self._hosts = hosts
        self.senders = [Part(serve_sender, rank, 2, hosts[rank]) for rank in range(2)]
        self.first = ProcessEngine(host=hosts[2])
        self.second = ProcessEngine(needs, host=hosts[3])
        self.agents = {host: Part(serve_agent, host) for host in agents}
        #: What happens to an agent, once.
        self.agent_faults: dict[int, Fault] = {}
        self.publisher = Publisher(
            {"first": self.first, "second": self.second},
            CheckpointEngineConfig(**config),
            {name: ("bfloat16", shape) for name, shape in SHAPES.items()},
            {host: self._agent(host) for host in agents},
            listen="127.0.0.1" if agents else "",
        )
        self._engines = [self.first, self.second]

    def _agent(self, host: int) -> AgentCall:
        async def take_part(address: Address, deadline_s: float) -> object:
            fault = self.agent_faults.pop(host, None)
            return await self.agents[host].ask((address, fault, deadline_s))

        return take_part

    def engine(self, host: int = 0) -> ProcessEngine:
        """Another one, which the publisher does not know."""
        self._engines.append(ProcessEngine(host=host))
        return self._engines[-1]

    def restart_agent(self, host: int) -> None:
        self.agents[host].end()
        self.agents[host] = Part(serve_agent, host)

    async def push(self, version: int, fault: Fault | None = None) -> PushReport:
        """A fault happens to trainer rank 1."""

        def rank(number: int, part: Part) -> TrainerRank:
            def send(address: Address, deadline_s: float) -> Awaitable[Any]:
                return part.ask((address, version, fault if number else None, deadline_s))

            def changes(plan: Plan, base: int, version: int) -> Awaitable[Rows]:
                return part.ask(("changes", plan, base, version))

            manifest: Manifest = part.ready
            return TrainerRank(manifest, send, changes, self._hosts[number])

        ranks = {number: rank(number, part) for number, part in enumerate(self.senders)}
        return await self.publisher.publish(ranks, version)

    def end(self) -> None:
        for part in (*self.senders, *self.agents.values()):
            part.end()
        for engine in self._engines:
            engine.end()


@contextlib.asynccontextmanager
async def group(**options: Any) -> AsyncIterator[Group]:
    everything = Group(**options)
    await everything.publisher.start()
    try:
        yield everything
    finally:
        await everything.publisher.close()
        everything.end()


def with_group(test: Callable[[Group], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with group(**options) as everything:
            await asyncio.wait_for(test(everything), 60)

    asyncio.run(run())
