"""Workers that start read a checkpoint together: each its share, once, and all end with the whole model."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from k2rl.checkpoint_engine.coordinator import Coordinator, Hosts
from k2rl.checkpoint_engine.disk import checkpoint_manifest
from k2rl.checkpoint_engine.manifest import merge
from k2rl.checkpoint_engine.messages import AGENT, RECEIVER, SENDER, Peer
from k2rl.checkpoint_engine.pieces import Piece
from k2rl.checkpoint_engine.plan import Plan, plan_push
from k2rl.checkpoint_engine.push import Invitations
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import Sender
from k2rl.checkpoint_engine.source import StoredWeights
from k2rl.models.hub import resolve_model
from tests.checkpoint_engine.parts import Part, serve_agent

DEADLINE_S = 30.0
PAGE = os.sysconf("SC_PAGESIZE")
#: What the kernel may read ahead of each of a rank's reads.
READ_AHEAD = 1 << 17


def kernel_counts() -> tuple[int, int, int]:
    """Bytes that this process has read before this call, and after it, and those that came from storage."""
    io = Path("/proc/self/io").read_text()
    counts = dict(line.split(": ") for line in io.splitlines())
    return int(counts["rchar"]), int(counts["rchar"]) + len(io), int(counts["read_bytes"])


class CountedWeights(StoredWeights):
    """Knows what it has read."""

    calls, storage = 0, 0

    def copier(self, plan: Plan, pieces: Sequence[Piece]) -> Callable[[], None]:
        read = super().copier(plan, pieces)

        def counted() -> None:
            _, calls, storage = kernel_counts()
            read()
            calls_after, _, storage_after = kernel_counts()
            self.calls += calls_after - calls
            self.storage += storage_after - storage

        return counted


def serve_stored_sender(folder: Path, rank: int, ranks: int, pipe: Connection) -> None:
    """A worker that sends its share of a checkpoint; answers with what it had to read for that."""
    with closing(CountedWeights(folder, rank=rank, ranks=ranks)) as stored:
        pipe.send(stored.manifest)
        Sender(rank, rank).send(stored, pipe.recv(), DEADLINE_S)
        assert folder / "model.safetensors" in open_files()
    assert folder / "model.safetensors" not in open_files()
    pipe.send((stored.calls, stored.storage))
    pipe.recv()


def open_files() -> list[Path]:
    return [Path(f"/proc/self/fd/{fd.name}").resolve() for fd in Path("/proc/self/fd").iterdir()]


def serve_model(folder: Path, rank: int, pipe: Connection) -> None:
    """A worker whose model is empty; answers with the digest of each tensor once it has them."""
    tensors = {
        spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in checkpoint_manifest(folder, 1).tensors
    }
    receiver = Receiver(rank, TensorTarget(tensors), rank)
    pipe.send(None)
    receiver.receive(pipe.recv(), DEADLINE_S)
    pipe.send(digests(tensors))
    pipe.recv()


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, str]]:
    return {
        name: (tensor.dtype, xxhash.xxh3_128_hexdigest(tensor.view(-1).view(torch.uint8).numpy()))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_read_a_checkpoint_once_and_all_have_it_all(workers: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("tiny-qwen3"), folder)
    file = folder / "model.safetensors"
    with file.open("rb") as opened:  # out of the page cache, so that reading it is reading the disk
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    counts, models = asyncio.run(start_up(folder, workers))
    manifest = checkpoint_manifest(folder, workers)
    assert sum(calls for calls, _ in counts) == manifest.nbytes, "every byte is asked for once"
    assert max(calls for calls, _ in counts) < manifest.nbytes / workers * 1.01, "by all alike"
    # A file system in memory has none, and the kernel reads whole pages, and ahead.
    spare = workers * (READ_AHEAD + PAGE)
    assert sum(storage for _, storage in counts) <= file.stat().st_size + spare
    expected = digests(load_file(file))
    assert all(model == expected for model in models)


async def start_up(
    folder: Path, workers: int
) -> tuple[list[tuple[int, int]], list[dict[str, tuple[torch.dtype, str]]]]:
    """What each worker read, and the model that each has then."""
    everyone = range(workers)
    senders = {rank: Part(serve_stored_sender, folder, rank, workers) for rank in everyone}
    models = {rank: Part(serve_model, folder, rank) for rank in everyone}
    agents = {host: Part(serve_agent, host) for host in everyone}
    plan = plan_push(merge([part.ready for part in senders.values()]), tuple(models), bucket_bytes=1 << 20)

    def asked(role: str, parts: dict[int, Part], *rest: object) -> Invitations:
        address = coordinator.remote_address
        job = (address, *rest) if rest else address
        return {Peer(role, rank): part.ask(job) for rank, part in parts.items()}

    async def pause() -> Invitations:
        return asked(RECEIVER, models)

    def invite_agents(hosts: Collection[int]) -> Invitations:
        assert set(hosts) == set(everyone)
        return asked(AGENT, agents, None, DEADLINE_S)

    try:
        async with Coordinator(DEADLINE_S, listen="127.0.0.1") as coordinator:
            host_of = {rank: rank for rank in everyone}
            hosts = Hosts(host_of, invite_agents)
            await coordinator.push(0, plan, host_of, lambda: asked(SENDER, senders), pause, hosts)
            counts = [await asyncio.wrap_future(part.asked_last) for part in senders.values()]
            found = [await asyncio.wrap_future(part.asked_last) for part in models.values()]
            return counts, found
    finally:
        for part in (*senders.values(), *models.values(), *agents.values()):
            part.end()
