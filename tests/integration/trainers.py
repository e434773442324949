"""Trainers in processes of their own: ranks that FSDP2 shards a model over, and one that coordinates, too."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.messages import SENDER, Peer, TransferError
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.push import Invitations
from k2rl.checkpoint_engine.sender import Sender, TensorSource


def serve_fsdp_rank(rank: int, ranks: int, store: Path, model_path: Path, pipe: Connection) -> None:
    """Jobs: `train`, `manifest`, `whole` (all weights as arrays); a method of `Sender`, arguments."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    pipe.send(None)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(rank))
    sender = Sender(rank)
    while (job := pipe.recv()) is not None:
        source = TensorSource(model.named_parameters(), rank)
        if job == "train":
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pipe.send(None)
        elif job == "manifest":
            pipe.send(source.manifest)
        elif job == "whole":
            whole = {name: tensor.full_tensor() for name, tensor in model.named_parameters()}
            pipe.send({name: tensor.detach().numpy() for name, tensor in whole.items()})
        else:
            try:
                pipe.send(getattr(sender, job[0])(source, *job[1:]))
            except TransferError as error:
                pipe.send(error)
    dist.destroy_process_group()


def serve_coordinating_trainer(
    model_path: Path, version: int, receivers: int, deadline_s: float, pipe: Connection
) -> None:
    """Pushes a model; says where to join once everything is staged."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    source = TensorSource(model.named_parameters(), 0)
    plan = plan_push(source.manifest, tuple(range(receivers)), bucket_bytes=1 << 20)
    pipe.send(None)

    async def push() -> None:
        async with Coordinator(deadline_s) as coordinator:

            def invite() -> Invitations:
                address = coordinator.address
                return {Peer(SENDER, 0): asyncio.to_thread(Sender(0).send, source, address, deadline_s)}

            async def pause() -> Invitations:
                pipe.send(coordinator.address)
                return {}

            await coordinator.push(version, plan, dict.fromkeys(plan.receivers, 0), invite, pause)

    asyncio.run(push())
