"""Bytes per second of a push on one host, beside what plain memory copies reach, taking turns.

Two trainer ranks hold the rows of a set of bfloat16 weights (as FSDP2 shards them), two receivers take all
of it: each byte is copied once into the arena and twice out of it, and hashed three times. The bar is what as
many processes as there are cores reach together in copying memory with `Tensor.copy_`, measured between
the pushes.

Then deltas: of every trainer rank's bytes a share changes, some rows of each tensor or some of the small
tensors, and only that is pushed. Looking for it counts. Pushes of everything take turns with them.

    make bench-push                            1 GiB, in large tensors and in tensors of 32 KiB
    make bench-push ARGS="--gib 2 --rounds 9"
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from itertools import chain
from multiprocessing.connection import Connection
from statistics import median

import msgspec
import torch

from k2rl.checkpoint_engine.cells import CELL_BYTES
from k2rl.checkpoint_engine.coordinator import Coordinator
from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec, merge
from k2rl.checkpoint_engine.messages import RECEIVER, SENDER, Peer
from k2rl.checkpoint_engine.plan import Plan, plan_delta, plan_push
from k2rl.checkpoint_engine.receiver import Receiver, TensorTarget
from k2rl.checkpoint_engine.sender import Sender, TensorSource

DEADLINE_S = 60.0
RANKS = (0, 1)
# Both generations of the arena must have been written once.
WARM_UP = 2
#: Of the rows, that change before a delta.
SHARES = (0.0, 0.01, 0.1, 1.0)


class HalfSource(TensorSource):
    """Every tensor's first or second half of rows."""

    def __init__(self, shapes: dict[str, tuple[int, int]], rank: int) -> None:
        torch.manual_seed(rank)
        self._local, specs, shards = {}, [], []
        for name, (rows, columns) in shapes.items():
            half = rows // 2
            first, last = (0, half) if rank == 0 else (half, rows)
            self._local[name] = (torch.rand(last - first, columns).to(torch.bfloat16), first)
            shards.append(Shard(len(specs), rank, first, last))
            specs.append(TensorSpec(name, "bfloat16", (rows, columns)))
        self.manifest = Manifest(tuple(specs), tuple(shards))

    def change(self, share: float) -> None:
        """Change this share of the rows: whole tensors where they are small, else a run of rows in each."""
        if share == 0:
            return
        locals_ = [local for local, _ in self._local.values()]
        if locals_[0].nbytes < CELL_BYTES:
            for local in locals_[: round(share * len(locals_))]:
                local.neg_()
        else:
            for local in locals_:
                local[: round(share * len(local))].neg_()


def shapes_of(tensor_bytes: int, total_bytes: int) -> dict[str, tuple[int, int]]:
    columns = 2048 if tensor_bytes >= 1 << 20 else 128
    return {
        f"t{index}": (tensor_bytes // 2 // columns, columns) for index in range(total_bytes // tensor_bytes)
    }


def serve(kind: str, rank: int, shapes: dict[str, tuple[int, int]], pipe: Connection) -> None:
    """A trainer rank or a receiver, or a process that copies memory: one task for each word it gets."""
    torch.set_num_threads(1)
    if kind == "sender":
        source, sender = HalfSource(shapes, rank), Sender(rank)
        pipe.send(source.manifest)
        while (job := pipe.recv()) is not None:
            match job:
                case ("change", share):
                    pipe.send(source.change(share))
                case ("plan", plan):
                    pipe.send(None)
                case ("changes", base):
                    pipe.send(sender.changes(source, plan, base, base + 1))
                case address:
                    pipe.send(sender.send(source, address, DEADLINE_S))
    elif kind == "receiver":
        target = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        receiver = Receiver(rank, TensorTarget(target))
        pipe.send(None)
        while (address := pipe.recv()) is not None:
            pipe.send(receiver.receive(address, DEADLINE_S))
    else:
        nbytes = sum(2 * rows * columns for rows, columns in shapes.values())
        one, other = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
        pipe.send(None)
        while pipe.recv() is not None:
            started = time.monotonic()
            other.copy_(one)
            pipe.send(nbytes / (time.monotonic() - started))


_answers: dict[Connection, asyncio.Future[object]] = {}


async def answer(pipe: Connection, word: object) -> object:
    """One at a time: nobody may wait any more for the answer before, which comes all the same."""
    if pipe in _answers:
        await asyncio.wait([_answers[pipe]])
    pipe.send(word)
    _answers[pipe] = asyncio.ensure_future(asyncio.to_thread(pipe.recv))
    return await asyncio.shield(_answers[pipe])


async def rounds(
    count: int, plan: Plan, pipes: dict[str, list[Connection]], coordinator: Coordinator
) -> None:
    copied = 3 * plan.nbytes
    ratios, rates = [], []
    for number in range(count + WARM_UP):
        memcpy = sum(await asyncio.gather(*(answer(pipe, "copy") for pipe in pipes["memcpy"])))
        one = max(await asyncio.gather(answer(pipes["memcpy"][0], "copy")))

        async def pause() -> dict[Peer, object]:
            return {
                Peer(RECEIVER, rank): answer(pipes["receiver"][rank], coordinator.address) for rank in RANKS
            }

        def invite() -> dict[Peer, object]:
            return {Peer(SENDER, rank): answer(pipes["sender"][rank], coordinator.address) for rank in RANKS}

        report = await coordinator.push(number, plan, dict.fromkeys(RANKS, 0), invite, pause)
        rate = copied / report.total_s
        print(
            f"{'warm-up' if number < WARM_UP else 'round'}: {report.total_s:.3f} s "
            f"(fill {report.stage_s:.3f}, apply {report.apply_s:.3f}), {rate / 1e9:.1f} GB/s copied; "
            f"memcpy {memcpy / 1e9:.1f} GB/s on {len(pipes['memcpy'])} cores, {one / 1e9:.1f} on one; "
            f"ratio {rate / memcpy:.2f}",
            flush=True,
        )
        if number >= WARM_UP:
            ratios.append(rate / memcpy)
            rates.append(2 * plan.nbytes / report.total_s / one)
    print(
        f"copied / memcpy on all cores: median {median(ratios):.2f}, min {min(ratios):.2f}; "
        f"delivered to both receivers / memcpy on one core: median {median(rates):.2f}"
    )


async def deltas(
    count: int, full: Plan, manifest: Manifest, pipes: dict[str, list[Connection]], coordinator: Coordinator
) -> None:
    """Pushes of what changed beside pushes of everything; seconds include looking for it and planning."""
    version = coordinator.version or 0

    async def push(plan: Plan) -> None:
        async def pause() -> dict[Peer, object]:
            return {
                Peer(RECEIVER, rank): answer(pipes["receiver"][rank], coordinator.address) for rank in RANKS
            }

        def invite() -> dict[Peer, object]:
            return {
                Peer(SENDER, rank): answer(pipes["sender"][rank], coordinator.address) for rank in plan.owners
            }

        await coordinator.push(version, plan, dict.fromkeys(RANKS, 0), invite, pause)

    # Once, as trainer ranks know it anyway.
    await asyncio.gather(*(answer(pipe, ("plan", full)) for pipe in pipes["sender"]))
    for share in SHARES:
        took: dict[str, list[float]] = {"delta": [], "full": [], "look": []}
        for number in range(count + WARM_UP):
            for kind in ("full", "delta", "delta"):
                await asyncio.gather(*(answer(pipe, ("change", share)) for pipe in pipes["sender"]))
                version += 1
                started = time.monotonic()
                plan = full
                if kind == "delta":
                    found = await asyncio.gather(
                        *(answer(pipe, ("changes", version - 1)) for pipe in pipes["sender"])
                    )
                    rows: dict[str, list[tuple[int, int]]] = {}
                    for name, ranges in chain(*(changed.items() for changed in found)):
                        rows.setdefault(name, []).extend(ranges)
                    plan = plan_delta(manifest, full, rows, version - 1)
                looked = time.monotonic()
                await push(plan)
                if number >= WARM_UP:
                    took[kind].append(time.monotonic() - started)
                    if kind == "delta":
                        took["look"].append(looked - started)
            # The first delta after a push of everything copies the version within the arena.
            first, later = took["delta"][::2], took["delta"][1::2]
        full_s, delta_s = median(took["full"]), median(later)
        print(
            f"{share:.0%} changed, {plan.strategy}: {plan.nbytes >> 20} MiB sent; full {full_s:.3f} s, "
            f"delta {delta_s:.3f} s (looking {median(took['look']):.3f}), ratio {delta_s / full_s:.2f}; "
            f"the first after a full push {median(first):.3f} s",
            flush=True,
        )


async def measure(tensor_bytes: int, total: int, count: int, bucket_mib: int, slots: int) -> None:
    shapes = shapes_of(tensor_bytes, total)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, list[Connection]] = {"sender": [], "receiver": [], "memcpy": []}
    processes = []
    cores = range(len(os.sched_getaffinity(0)))
    for kind, ranks in (("sender", RANKS), ("receiver", RANKS), ("memcpy", cores)):
        for rank in ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(kind, rank, shapes, theirs), daemon=True)
            process.start()
            processes.append(process)
            pipes[kind].append(ours)
    manifests = [pipe.recv() for pipe in pipes["sender"]]
    for pipe in (*pipes["receiver"], *pipes["memcpy"]):
        pipe.recv()
    manifest = merge(manifests)
    plan = plan_push(manifest, RANKS, bucket_bytes=bucket_mib << 20, slots=slots)
    print(
        f"{total >> 20} MiB in {len(shapes)} tensors of {tensor_bytes >> 10} KiB, {len(plan.buckets)} buckets"
    )
    async with Coordinator(DEADLINE_S) as coordinator:
        await rounds(count, plan, pipes, coordinator)
        finer = msgspec.structs.replace(plan, cell_bytes=CELL_BYTES)
        await deltas(max(count // 2, 1), finer, manifest, pipes, coordinator)
    await asyncio.wait(_answers.values())
    _answers.clear()
    for pipe in chain(*pipes.values()):
        pipe.send(None)
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--slots", type=int, default=0, help="0 keeps the whole version in the arena")
    args = parser.parse_args()
    for tensor_bytes in (32 << 20, 32 << 10):
        asyncio.run(measure(tensor_bytes, int(args.gib * 2**30), args.rounds, args.bucket_mib, args.slots))


if __name__ == "__main__":
    main()
