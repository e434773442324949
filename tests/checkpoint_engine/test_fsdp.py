"""Weights that FSDP2 has spread over two processes arrive as one model."""

from __future__ import annotations

import asyncio
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.manifest import merge
from k2rl.checkpoint_engine.messages import RECEIVER, SENDER, Peer
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.push import Invitations
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import Sender, TensorSource

RANKS = 2
DEADLINE_S = 30.0


def _train(rank: int, store: str, pipe: Connection) -> None:
    """Says what it holds and what the whole is; then takes part in one push."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    # Seven rows for two ranks; one row for two ranks; and what is not sharded at all.
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1), nn.LayerNorm(3))
    for layer in model[:2]:
        fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
    source = TensorSource(model.named_parameters(), rank)
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    pipe.send((source.manifest, {name: tensor.tolist() for name, tensor in whole.items()}))
    Sender(rank).send(source, pipe.recv(), DEADLINE_S)
    pipe.send("sent")
    dist.destroy_process_group()


def test_a_model_sharded_by_fsdp_arrives_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    pipes = []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        context.Process(target=_train, args=(rank, str(tmp_path / "store"), theirs), daemon=True).start()
        theirs.close()
    said = [pipe.recv() for pipe in pipes]
    manifest, expected = merge([parts for parts, _ in said]), said[0][1]
    assert said[1][1] == expected
    assert {spec.name: spec.shape for spec in manifest.tensors} == {
        name: torch.tensor(values).shape for name, values in expected.items()
    }
    tensors = {spec.name: torch.zeros(spec.shape) for spec in manifest.tensors}
    plan = plan_push(manifest, [0], bucket_bytes=256)
    assert {owner for bucket in plan.buckets for owner in bucket.owners} == {0, 1}

    async def push() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor() as threads:
            async with Coordinator(DEADLINE_S) as coordinator:

                def invite() -> Invitations:
                    for pipe in pipes:
                        pipe.send(coordinator.address)
                    return {
                        Peer(SENDER, rank): loop.run_in_executor(threads, pipe.recv)
                        for rank, pipe in enumerate(pipes)
                    }

                async def pause() -> Invitations:
                    receive = Receiver(0, TensorTarget(tensors)).receive
                    return {
                        Peer(RECEIVER, 0): loop.run_in_executor(
                            threads, receive, coordinator.address, DEADLINE_S
                        )
                    }

                await coordinator.push(1, plan, {0: 0}, invite, pause)

    asyncio.run(push())
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == expected
