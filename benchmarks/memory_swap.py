"""What trainer and vLLM hold while the other works, what a switch costs, and whether fifty of them leak.

SmolLM2-135M with a KV cache of 2 GiB, all of it in use. A round is what a step does: a full batch is
generated, of sequences of different lengths, vLLM gives its memory back, the trainer takes an optimizer
step, new weights are pushed. Resident memory is what the kernel says of each process, shared memory
included. The trainer's process, which hosts vLLM's front end too, is measured after each push.

    make bench-swap                                           fifty rounds
    make bench-swap ARGS="--offload file --model tiny-qwen3"  the trainer gives its memory back, too
    make bench-swap ARGS="--workers 2 --rounds 8"             workers of a run, in Ray, each with a vLLM
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors, local_rank
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.composition import compose
from k2rl.config import CheckpointEngineConfig, InferenceConfig, OptimizerConfig
from k2rl.hardware import fast_dtype
from k2rl.inference.engine import InferenceEngine, Sampling
from k2rl.inference.prefork import start_server
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.hub import resolve_model
from k2rl.training.engine import TrainEngine
from k2rl.training.supervised import SupervisedSequence
from k2rl.workers.cluster import ray_cluster
from k2rl.workers.group import WorkerGroup
from k2rl.workers.memory import GIB, resident, trim
from k2rl.workers.recovery import Recovery
from k2rl.workers.spec import worker_spec

KV_GIB = 2.0
LENGTH = 256


class FillCache:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def fill_cache(self) -> None:
        for cache in self.model_runner.kv_caches:
            cache.fill_(0)


async def generate(engine: InferenceEngine, seed: int, sequences: int) -> None:
    """As episodes do: batches of every size, from full to empty."""
    rng = random.Random(seed)

    async def sample(number: int) -> None:
        prompt = [rng.randrange(5, 200) for _ in range(rng.randint(20, 120))]
        await engine.generate(prompt, Sampling(1.0, rng.randint(1, 24), number))

    await asyncio.gather(*(sample(number) for number in range(sequences)))


def memcpy_gbps(nbytes: int) -> float:
    """Bytes copied a second, of which as many are read."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - began)
    return nbytes / median(seconds) / 1e9


async def play(model: str, rounds: int, sequences: int, offload: Path | None) -> None:
    path, dtype = resolve_model(model), fast_dtype(gpu=False)
    config = InferenceConfig(
        kv_cache_gib=KV_GIB, engine_args={"worker_extension_cls": "memory_swap.FillCache"}
    )
    engine = VLLMEngine(path, dtype, (), config, seed=0).start()
    publisher = Publisher({"vLLM": engine}, CheckpointEngineConfig(), expected_tensors(path, dtype))
    await publisher.start()
    trainer_base = resident()
    trainer = TrainEngine(
        path, dtype, OptimizerConfig(lr=1e-6), offload="file" if offload else "none", offload_folder=offload
    )
    sender = Sender(0)
    text = SupervisedSequence(tuple(range(5, 5 + LENGTH)), (False,) + (True,) * (LENGTH - 1))

    async def push(version: int) -> None:
        source = TensorSource(trainer.named_weights(), 0)
        await publisher.publish({0: local_rank(sender, source, asyncio.to_thread)}, version)

    try:
        held: list[tuple[float, ...]] = []
        seconds: list[float] = []
        moved: list[float] = []
        for number in range(rounds + 1):
            began = time.perf_counter()
            trainer.offload()
            moved.append(time.perf_counter() - began)
            trim()
            if engine.asleep:
                await engine.wake_up()
            woken = time.perf_counter() - began
            await push(number)
            sender.unload()
            trainer.offload()
            trim()
            await generate(engine, number, sequences)
            await engine._llm.collective_rpc("fill_cache")
            serving, base = await engine.resident_memory()
            trainer_idle = resident()
            together = serving
            if number == 0:
                trainer.sft_step([text])
                together += resident()
                print(f"without swap, after one step: {together / GIB:.2f} GiB together")
            began = time.perf_counter()
            await engine.sleep()
            seconds.append(time.perf_counter() - began + woken)
            asleep, _ = await engine.resident_memory()
            began = time.perf_counter()
            trainer.reload()
            moved[-1] += time.perf_counter() - began
            trainer.sft_step([text])
            held.append(tuple(value / GIB for value in (base, serving, asleep, trainer_idle, resident())))
            print(f"round {number}: {' '.join(f'{value:.2f}' for value in held[-1])} GiB", flush=True)
        first, last = held[1], held[-1]
        share = last[3] * GIB / trainer_base
        print(f"trainer before its model {trainer_base / GIB:.2f} GiB; while vLLM serves {share:.2f} of it")
        if offload:
            state = trainer.state_bytes()
            nbytes = state["parameters"] + state["optimizer"]
            rate, copying = 2 * nbytes / median(moved[1:]) / 1e9, memcpy_gbps(nbytes)
            print(
                f"offload and reload of {nbytes / GIB:.2f} GiB: {rate:.1f} GB/s, {rate / copying:.2f} of a "
                f"copy in memory ({copying:.1f} GB/s)"
            )
        for name, row in (("second round", first), ("last round", last)):
            print(
                f"{name}, GiB: vLLM without a model {row[0]:.2f}, serving {row[1]:.2f}, asleep "
                f"{row[2]:.2f} ({row[2] / row[0]:.2f} of its base); "
                f"trainer while vLLM serves {row[3]:.2f}, after a step {row[4]:.2f}"
            )
        together = max(max(row[1] + row[3], row[2] + row[4]) for row in held[1:])
        print(f"with swap: {together:.2f} GiB together at most")
        growth = f"vLLM {last[2] / first[2] - 1:+.1%}, trainer {last[3] / first[3] - 1:+.1%}"
        print(f"growth over {rounds - 1} switches: {growth}")
        print(f"a switch there and back: median {median(seconds[1:]):.3f} s, without the push")
    finally:
        await publisher.close()
        engine.shutdown()


async def play_workers(model: str, rounds: int, sequences: int, workers: int) -> None:
    """The same with the workers of a run, which measure themselves; sums over all of them."""
    changes = [f"cluster.workers={workers}", f"inference.kv_cache_gib={KV_GIB}", "optimizer.lr=1e-6"]
    config = compose([f"model.path={model}", *changes])
    text = SupervisedSequence(tuple(range(5, 5 + LENGTH)), (False,) + (True,) * (LENGTH - 1))
    with tempfile.TemporaryDirectory() as folder, ray_cluster(config.cluster):
        recovery = Recovery(Path(folder), max_restarts=0)
        spec = worker_spec(config, resolve_model(model), (), Path(folder))
        group = await WorkerGroup.start(config, spec, recovery)
        try:
            held: list[dict[str, float]] = []
            for number in range(rounds + 1):
                row = await group.publish()
                await generate(group, number, sequences)
                row |= await group.sft_step([text] * workers)
                held.append({name: value for name, value in row.items() if name.startswith("memory/")})
        finally:
            await group.shutdown()
            recovery.close()
    for name, row in (("second round", held[1]), ("last round", held[-1])):
        asleep, base = row["memory/vllm_while_training_gib"], row["memory/vllm_without_model_gib"]
        idle, trainer_base = row["memory/trainer_while_serving_gib"], row["memory/trainer_without_model_gib"]
        print(
            f"{name}, GiB of {workers} workers: vLLM without a model {base:.2f}, asleep {asleep:.2f} "
            f"({asleep / base:.2f} of its base); trainers before their model {trainer_base:.2f}, while vLLM "
            f"serves {idle:.2f}"
        )
    growth = {
        name: held[-1][f"memory/{name}_gib"] / held[1][f"memory/{name}_gib"] - 1
        for name in ("vllm_while_training", "trainer_while_serving")
    }
    print(
        f"growth over {rounds - 1} switches: {', '.join(f'{name} {by:+.1%}' for name, by in growth.items())}"
    )
    seconds = [row["memory/to_training_s"] + row["memory/to_serving_s"] for row in held[1:]]
    print(f"a switch there and back: median {median(seconds):.3f} s, without the push")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--sequences", type=int, default=32, help="generated in a round")
    start_server()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--offload", choices=["none", "file"], default="none")
    parser.add_argument("--workers", type=int, default=0, help="of a run, in Ray; default: none, no Ray")
    arguments = parser.parse_args()
    if arguments.workers:
        asyncio.run(play_workers(arguments.model, arguments.rounds, arguments.sequences, arguments.workers))
        return
    # Beside the other outputs: a temporary folder may be memory.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        offload = Path(folder) if arguments.offload == "file" else None
        asyncio.run(play(arguments.model, arguments.rounds, arguments.sequences, offload))


if __name__ == "__main__":
    main()
