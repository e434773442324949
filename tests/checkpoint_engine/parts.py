"""Trainer ranks and receivers as real processes that can be made to die, hang or raise at a given point."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2rl.checkpoint_engine.agent import HostAgent
from k2rl.checkpoint_engine.arena import PREFIX
from k2rl.checkpoint_engine.coordinator import Coordinator, Hosts
from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec, merge
from k2rl.checkpoint_engine.messages import AGENT, RECEIVER, SENDER, Address, Peer, TransferError
from k2rl.checkpoint_engine.pieces import Piece
from k2rl.checkpoint_engine.plan import Bucket, Plan, plan_delta, plan_push
from k2rl.checkpoint_engine.push import Invitations, PushReport
from k2rl.checkpoint_engine.receiver import Receiver, Step, TensorTarget
from k2rl.checkpoint_engine.relay import HostRelay
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from tests import netns

#: Several buckets of several tensors; odd sizes, a scalar, and one tensor with a single row.
SHAPES = {
    "embed": (64, 33),
    "norm": (129,),
    "scale": (),
    "up": (40, 64),
    "down": (33, 7, 3),
    "one_row": (1, 50),
    "head": (64, 33),
}
BUCKET_BYTES = 5376
DTYPE = torch.bfloat16

#: What goes wrong: ("kill" | "stop" | "raise" | "flip", at which call of copying, placing or transferring);
#: half a call more: right after it, before anybody has been told; `BEFORE`: before it even connects.
Fault = tuple[str, float]
BEFORE = -1


def weights(version: int) -> dict[str, Tensor]:
    """The whole model at a version; from 1000 on, those of one thousand differ only in a row of `head`."""
    few, row = divmod(version, 1000)
    generator = torch.Generator().manual_seed(few or version)
    found = {name: torch.randn(shape, generator=generator).to(DTYPE) for name, shape in SHAPES.items()}
    if few:
        found["head"][row % len(found["head"])] = row
    return found


class Trigger:
    """Carries out a fault at the n-th call."""

    def __init__(self) -> None:
        self.arm(None)

    def arm(self, fault: Fault | None) -> None:
        self.fault, self._calls = fault, 0
        self._act(BEFORE)

    def __call__(self) -> None:
        self._calls += 1
        self._act(self._calls - 1)

    def after(self) -> None:
        """The call is done."""
        self._act(self._calls - 0.5)

    def _act(self, now: float) -> None:
        if self.fault is None or self.fault[1] != now:
            return
        kind = self.fault[0]
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise RuntimeError("out of luck")

    def flips(self) -> bool:
        """Whether a byte is to be flipped at this call."""
        if self.fault is None or self.fault[0] != "flip":
            return False
        self._calls += 1
        return self._calls - 1 == self.fault[1]


class ShardedSource(TensorSource):
    """The rows that rank `rank` of `ranks` holds; small tensors belong to rank 0."""

    def __init__(self, rank: int, ranks: int, trigger: Trigger) -> None:
        self._trigger = trigger
        self._local, specs, shards = {}, [], []
        for index, (name, shape) in enumerate(SHAPES.items()):
            rows = shape[0] if shape else 1
            first, last = rank * rows // ranks, (rank + 1) * rows // ranks
            specs.append(TensorSpec(name, "bfloat16", shape))
            if last > first:
                shards.append(Shard(index, rank, first, last))
            self._local[name] = (torch.zeros((last - first, *shape[1:]) if shape else (), dtype=DTYPE), first)
        self.manifest = Manifest(tuple(specs), tuple(shards))

    def set(self, version: int) -> None:
        for name, tensor in weights(version).items():
            local, first = self._local[name]
            local.copy_(tensor[first : first + len(local)] if tensor.ndim else tensor)

    def copier(self, plan: Plan, pieces: Sequence[Piece]) -> Callable[[], None]:
        copy = super().copier(plan, pieces)

        def copy_or_fail() -> None:
            self._trigger()
            copy()
            self._trigger.after()

        return copy_or_fail


class FaultyTarget(TensorTarget):
    def __init__(self, trigger: Trigger) -> None:
        self.tensors = {name: torch.zeros(shape, dtype=DTYPE) for name, shape in SHAPES.items()}
        super().__init__(self.tensors)
        self._trigger = trigger

    def steps(self, plan: Plan, bucket: Bucket, memory: Tensor) -> list[Step]:
        steps = super().steps(plan, bucket, memory)

        def place_or_fail(place: Callable[[], None]) -> Callable[[], None]:
            def act() -> None:
                self._trigger()
                place()
                self._trigger.after()

            return act

        return [(views, place_or_fail(place)) for views, place in steps]

    def finish(self) -> None:
        super().finish()
        self._trigger()


def serve_sender(rank: int, ranks: int, host: int, pipe: Connection) -> None:
    trigger = Trigger()
    source, sender = ShardedSource(rank, ranks, trigger), Sender(rank, host)
    pipe.send(source.manifest)
    while (job := pipe.recv()) is not None:
        if job == "arenas":
            pipe.send(mapped_arenas())
            continue
        if job[0] == "changes":
            trigger.arm(None)
            source.set(job[-1])
            pipe.send(sender.changes(source, *job[1:]))
            continue
        address, version, fault, deadline_s = job
        trigger.arm(fault)
        source.set(version)
        pipe.send(answer_with(sender.send, source, address, deadline_s))


def serve_receiver(rank: int, host: int, pipe: Connection) -> None:
    trigger = Trigger()
    target = FaultyTarget(trigger)
    receiver = Receiver(rank, target, host)
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        if job == "arenas":
            pipe.send(mapped_arenas())
            continue
        if job == "state":
            fds = len(list(Path("/proc/self/fd").iterdir()))
            pipe.send((receiver.version, {k: v.float().tolist() for k, v in target.tensors.items()}, fds))
            continue
        address, fault, deadline_s = job
        trigger.arm(fault)
        pipe.send(answer_with(receiver.receive, address, deadline_s))


def mapped_arenas() -> list[str]:
    """Names of the arenas that this process has mapped."""
    maps = Path("/proc/self/maps").read_text()
    return sorted({line.split("memfd:")[1].split()[0] for line in maps.splitlines() if PREFIX in line})


def serve_agent(host: int, pipe: Connection) -> None:
    trigger = Trigger()
    agent = FaultyAgent(host, trigger)
    pipe.send(None)
    while (job := pipe.recv()) is not None:
        if job == "arenas":
            pipe.send(mapped_arenas())
            continue
        address, fault, deadline_s = job
        trigger.arm(fault)
        pipe.send(answer_with(agent.take_part, address, deadline_s))


class FaultyAgent(HostAgent):
    def __init__(self, host: int, trigger: Trigger) -> None:
        super().__init__(host)
        self._trigger = trigger

    def transfer(self, relay: HostRelay, memory: Tensor, bucket: Bucket, host_of: dict[int, int]) -> None:
        if self._trigger.flips():
            memory = memory.clone()
            memory[7] ^= 1
        elif self._trigger.fault is None or self._trigger.fault[0] != "flip":
            self._trigger()
        super().transfer(relay, memory, bucket, host_of)


def serve_coordinator(plan: Plan, pipe: Connection) -> None:
    """Says where it listens once it has begun a push, and `staged` once all is filled; then waits."""

    async def coordinate() -> None:
        async with Coordinator(600.0) as coordinator:

            def invite() -> Invitations:
                pipe.send(coordinator.address)
                return {}

            async def pause() -> Invitations:
                pipe.send("staged")
                return await asyncio.Future()

            await coordinator.push(1, plan, dict.fromkeys(plan.receivers, 0), invite, pause)

    asyncio.run(coordinate())


def answer_with(call: Callable[..., int], *arguments: Any) -> int | Exception:
    """What the call returns or raises."""
    try:
        return call(*arguments)
    except (TransferError, RuntimeError) as error:
        return error


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.checkpoint_engine.parts"])


def _at(place: netns.Host | None, serve: Callable[..., None], *arguments: Any) -> None:
    if place is not None:
        place.enter()
    serve(*arguments)


class Part:
    """One process, and a pipe to it."""

    def __init__(self, serve: Callable[..., None], *arguments: Any, place: netns.Host | None = None) -> None:
        self._pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_at, args=(place, serve, *arguments, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = self._pipe.recv()
        self._asked: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            future = self._asked.get()
            try:
                answer = self._pipe.recv()
            except (EOFError, OSError):
                answer = EOFError("the process died")
            if isinstance(answer, Exception):
                future.set_exception(answer)
                if isinstance(answer, EOFError):
                    self._pipe.close()
                    return
            else:
                future.set_result(answer)

    async def ask(self, job: object) -> Any:
        """Its answer; raises what it raised, or EOFError if it died."""
        self.asked_last = future = Future[Any]()
        self._asked.put(future)
        self._pipe.send(job)
        # Answers come in order: one that nobody waits for any more must be read all the same.
        waiting = asyncio.wrap_future(future)
        # Of a push that has failed nobody asks any more, and what it raised is in the coordinator's error.
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(waiting)

    def listen(self) -> Any:
        """What it says without having been asked."""
        return self._pipe.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        # Wakes the reader, which closes the pipe.
        self._asked.put(Future())


class Cluster:
    """Two trainer ranks and two receivers on this host, or one of each on every one of several hosts.

    These hosts are processes with an arena of their own, which gloo connects. `spare` more hosts have a
    receiver each, which no push reaches. With `places` each host has a network of its own.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        slots: int = 0,
        hosts: int = 1,
        spare: int = 0,
        places: Sequence[netns.Host] = (),
    ) -> None:
        self.coordinator = coordinator
        self.hosts = hosts
        self.ranks = max(hosts, 2)
        self._places = places
        #: Host of each receiver that pushes reach, and of all.
        self.reached = {rank: rank % hosts for rank in range(self.ranks)}
        self.host_of = self.reached | {self.ranks + number: hosts + number for number in range(spare)}
        self.asked_agents: list[int] = []
        self.senders: dict[int, Part] = {}
        self.receivers: dict[int, Part] = {}
        self.agents: dict[int, Part] = {}
        for rank in range(self.ranks):
            self.restart(SENDER, rank)
        for rank in self.host_of:
            self.restart(RECEIVER, rank)
        for host in range(hosts + spare) if hosts + spare > 1 else ():
            self.restart(AGENT, host)
        self.manifest = merge([part.ready for part in self.senders.values()])
        self.plan = plan_push(self.manifest, tuple(self.reached), bucket_bytes=BUCKET_BYTES, slots=slots)

    async def push(
        self,
        version: int,
        sender_faults: dict[int, Fault] | None = None,
        receiver_faults: dict[int, Fault] | None = None,
        agent_faults: dict[int, Fault] | None = None,
        before_delivery: Callable[[], None] = lambda: None,
        base: int | None = None,
    ) -> PushReport:
        """Push everything, or what differs from version `base`."""
        faults = sender_faults or {}
        plan = self.plan if base is None else await self.delta(base, version)

        def invite() -> Invitations:
            return {
                Peer(SENDER, rank): part.ask((self.address, version, faults.get(rank), self.deadline_s))
                for rank, part in self.senders.items()
                if rank in plan.owners
            }

        async def pause() -> Invitations:
            before_delivery()
            reached = {rank: self.receivers[rank] for rank in self.reached}
            return self._invite(RECEIVER, reached, receiver_faults or {})

        hosts = self._hosts(agent_faults or {}) if self.hosts > 1 else None
        return await self.coordinator.push(version, plan, self.reached, invite, pause, hosts)

    async def delta(self, base: int, version: int) -> Plan:
        changed: dict[str, list[tuple[int, int]]] = {}
        for part in self.senders.values():
            for name, rows in (await part.ask(("changes", self.plan, base, version))).items():
                changed.setdefault(name, []).extend(rows)
        return plan_delta(self.manifest, self.plan, changed, base)

    async def join(
        self,
        *ranks: int,
        agent_faults: dict[int, Fault] | None = None,
        receiver_faults: dict[int, Fault] | None = None,
    ) -> PushReport:
        async def pause() -> Invitations:
            joining = {rank: self.receivers[rank] for rank in ranks}
            return self._invite(RECEIVER, joining, receiver_faults or {})

        self.asked_agents = []
        hosts = self._hosts(agent_faults or {})
        return await self.coordinator.join({rank: self.host_of[rank] for rank in ranks}, pause, hosts)

    def _hosts(self, faults: dict[int, Fault]) -> Hosts | None:
        def invite(hosts: Collection[int]) -> Invitations:
            self.asked_agents = [*self.asked_agents, *hosts]
            return self._invite(AGENT, {host: self.agents[host] for host in hosts}, faults)

        return Hosts({rank: self.host_of[rank] for rank in self.senders}, invite) if self.agents else None

    def _invite(self, role: str, parts: dict[int, Part], faults: dict[int, Fault]) -> Invitations:
        return {
            Peer(role, rank): part.ask((self.address, faults.get(rank), self.deadline_s))
            for rank, part in parts.items()
        }

    async def state(self, rank: int) -> tuple[int | None, dict[str, Any], int]:
        """Version in place, tensors, and number of open files of a receiver."""
        return await self.receivers[rank].ask("state")  # type: ignore[no-any-return]

    async def holds(self, rank: int, version: int) -> bool:
        """Whether a receiver has exactly this version in place."""
        place, tensors, _ = await self.state(rank)
        return place == version and tensors == {k: v.float().tolist() for k, v in weights(version).items()}

    def restart(self, role: str, rank: int) -> None:
        """Start a part, in place of one that is there."""
        parts, serve, arguments = {
            SENDER: (self.senders, serve_sender, (rank, self.ranks, self.host_of.get(rank, 0))),
            RECEIVER: (self.receivers, serve_receiver, (rank, self.host_of.get(rank, 0))),
            AGENT: (self.agents, serve_agent, (rank,)),
        }[role]
        if rank in parts:
            parts[rank].end()
        host = rank if role == AGENT else self.host_of[rank]
        parts[rank] = Part(serve, *arguments, place=self._places[host] if self._places else None)

    @property
    def address(self) -> Address:
        return self.coordinator.remote_address if self.agents else self.coordinator.address

    @property
    def deadline_s(self) -> float:
        return self.coordinator.deadline_s

    def end(self) -> None:
        for part in (*self.senders.values(), *self.receivers.values(), *self.agents.values()):
            part.end()


@contextlib.asynccontextmanager
async def cluster(
    deadline_s: float = 30.0,
    slots: int = 0,
    hosts: int = 1,
    spare: int = 0,
    places: Sequence[netns.Host] = (),
) -> Any:
    address = places[0].address if places else "127.0.0.1"
    async with Coordinator(deadline_s, listen=address if hosts + spare > 1 else "") as coordinator:
        parts = Cluster(coordinator, slots, hosts, spare, places)
        try:
            yield parts
        finally:
            parts.end()
