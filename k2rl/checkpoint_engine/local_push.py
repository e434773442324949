"""Measured pushes on this machine: a coordinator, a trainer rank and a receiver, each in its own process."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

import msgspec
import numpy as np
import torch
import xxhash

from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.manifest import Manifest
from k2rl.checkpoint_engine.messages import RECEIVER, SENDER, Address, Peer, TransferError
from k2rl.checkpoint_engine.plan import Plan, Rows, plan_delta
from k2rl.checkpoint_engine.push import Invitations
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.config import DeviceConfig

#: Seconds that a part of a push may take before the measurement is given up.
DEADLINE_S = 60.0
GIGA = 1e9
MIB = 2**20


class LocalPushes:
    """The executor as it is, between two processes; a context manager. Every plan keeps its memory."""

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("forkserver")
        self._parts: dict[str, tuple[Any, Connection]] = {}
        for role in (SENDER, RECEIVER):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(role, theirs), daemon=True)
            process.start()
            theirs.close()
            self._parts[role] = (process, ours)
        self._runner = asyncio.Runner()
        self._coordinators: dict[str, Coordinator] = {}
        self._open = AsyncExitStack()
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.run(self._open.aclose())
        self._runner.close()
        for process, pipe in self._parts.values():
            pipe.close()
            process.join(DEADLINE_S)
            if process.is_alive():
                process.kill()

    def push(self, plan: Plan) -> float:
        """Seconds from begin to commit.

        Raises:
            TransferError: a process died, hangs, or read something else than was sent.
        """
        return self._runner.run(self._push(plan))

    def push_changed(self, full: Plan, changed: Rows) -> tuple[float, Plan]:
        """Change rows of the trainer's, let it find what has changed since the last push, and push that.

        Returns:
            Seconds from the beginning of the search to the commit, and the plan.

        Raises:
            TransferError: as `push`.
        """
        return self._runner.run(self._push_changed(full, changed))

    async def _push_changed(self, full: Plan, changed: Rows) -> tuple[float, Plan]:
        base = self._coordinators[full.digest].version
        await self._ask(SENDER, full)
        await self._ask(SENDER, _Change(changed))
        started = time.monotonic()
        assert base is not None
        found = await self._ask(SENDER, _Search(full, base, base + 1))
        rows = msgspec.convert(found, dict[str, list[tuple[int, int]]])
        plan = plan_delta(Manifest.whole(full.tensors), full, rows, base)
        looked = time.monotonic()
        return looked - started + await self._push(full, plan), plan

    async def _push(self, full: Plan, delta: Plan | None = None) -> float:
        plan = delta or full
        coordinator = self._coordinators.get(full.digest)
        if coordinator is None:
            coordinator = await self._open.enter_async_context(Coordinator(DEADLINE_S))
            self._coordinators[full.digest] = coordinator
        # Both are ready, their memory touched, before the clock starts.
        for role in self._parts:
            await self._ask(role, full)
        version = (coordinator.version or 0) + 1

        calls: list[asyncio.Future[object]] = []

        def invite(role: str) -> Invitations:
            calls.append(asyncio.ensure_future(self._ask(role, coordinator.address)))
            return {Peer(role, 0): asyncio.shield(calls[-1])}

        async def receive() -> Invitations:
            return invite(RECEIVER)

        def send() -> Invitations:
            return invite(SENDER) if plan.owners else {}

        try:
            report = await coordinator.push(version, plan, {0: 0}, send, receive)
        finally:
            # The push ends before they have answered, and two may not read from a pipe at once.
            await asyncio.gather(*calls, return_exceptions=True)
        return report.total_s

    async def _ask(self, role: str, job: object) -> object:
        pipe = self._parts[role][1]
        pipe.send(job)
        answer = await asyncio.to_thread(_answer, pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _answer(pipe: Connection) -> object:
    if not pipe.poll(2 * DEADLINE_S):
        return TransferError(f"no answer for {2 * DEADLINE_S:g} s")
    try:
        return pipe.recv()
    except EOFError:
        return TransferError("the process died")


def _serve(role: str, pipe: Connection) -> None:
    """A trainer rank or a receiver: a plan makes it ready, what comes then is for the part of this plan."""
    torch.set_num_threads(1)
    known: dict[str, Callable[[Any], object]] = {}
    current = ""
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if isinstance(job, Plan):
            current = job.digest
            if current not in known:
                known[current] = _part(role, job)
            pipe.send(None)
            continue
        try:
            pipe.send(known[current](job))
        except TransferError as error:
            pipe.send(error)


@dataclass
class _Change:
    """To a trainer rank: other weights in these rows."""

    rows: Rows


@dataclass
class _Search:
    """To a trainer rank: find what has changed, as `Sender.changes`."""

    full: Plan
    base: int
    version: int


def _part(role: str, plan: Plan) -> Callable[[Any], object]:
    """A function of the address of a push, or of another job."""
    tensors = {s.name: torch.ones(s.shape, dtype=getattr(torch, s.dtype)) for s in plan.tensors}
    if role == SENDER:
        source, sender = TensorSource(tensors.items(), rank=0), Sender(0)

        def serve(job: Address | _Change | _Search) -> object:
            if isinstance(job, Address):
                return sender.send(source, job, DEADLINE_S)
            if isinstance(job, _Search):
                return sender.changes(source, job.full, job.base, job.version)
            for name, ranges in job.rows.items():
                for start, stop in ranges:
                    rows = tensors[name][start:stop] if tensors[name].ndim else tensors[name]
                    rows.add_(1)
            return None

        return serve
    receiver = Receiver(0, TensorTarget(tensors))
    return lambda address: receiver.receive(address, DEADLINE_S)


def micro_measurements(nbytes: int = 64 * MIB) -> DeviceConfig:
    """A first guess at this machine's sheet, from copies and hashes in one process, in about a second."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    small = 4096

    def whole() -> None:
        target[:] = source
        xxhash.xxh3_128_digest(target.data)

    def pieces() -> None:
        for start in range(0, 512 * small, small):
            target[start : start + small] = source[start : start + small]
            xxhash.xxh3_128_digest(target[start : start + small].data)

    rate = nbytes / _fastest(whole) / GIGA
    block_us = _fastest(pieces) / 512 * 1e6
    # Two processes on one memory: at most twice one's rate.
    return DeviceConfig(
        copy_in_gbps=rate,
        apply_gbps=rate,
        memory_gbps=2 * rate,
        block_us=block_us,
        message_us=50.0,
        push_ms=1.0,
    )


def _fastest(work: Callable[[], None], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
