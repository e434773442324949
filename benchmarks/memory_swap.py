"""What trainer and vLLM hold while the other works, what a switch costs, and whether fifty of them leak.

SmolLM2-135M with a KV cache of 2 GiB, all of it in use. A round is what a step does: vLLM gives its memory
back, the trainer takes an optimizer step, new weights are pushed. Resident memory is what the kernel says of
each process, shared memory included.

    make bench-swap                       fifty rounds
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import median
from typing import Any

from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors, local_rank
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.config import CheckpointEngineConfig, InferenceConfig, OptimizerConfig
from k2rl.hardware import fast_dtype
from k2rl.inference.prefork import start_server
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.hub import resolve_model
from k2rl.training.engine import TrainEngine
from k2rl.training.supervised import SupervisedSequence
from k2rl.workers.memory import resident, trim

GIB = 1 << 30
KV_GIB = 2.0
LENGTH = 256


class FillCache:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def fill_cache(self) -> None:
        for cache in self.model_runner.kv_caches:
            cache.fill_(0)


async def play(rounds: int) -> None:
    path, dtype = resolve_model("smollm2-135m"), fast_dtype(gpu=False)
    config = InferenceConfig(
        kv_cache_gib=KV_GIB, engine_args={"worker_extension_cls": "memory_swap.FillCache"}
    )
    engine = VLLMEngine(path, dtype, (), config, seed=0).start()
    publisher = Publisher({"vLLM": engine}, CheckpointEngineConfig(), expected_tensors(path, dtype))
    await publisher.start()
    trainer_base = resident()
    trainer = TrainEngine(path, dtype, OptimizerConfig(lr=1e-6))
    sender = Sender(0)
    text = SupervisedSequence(tuple(range(5, 5 + LENGTH)), (False,) + (True,) * (LENGTH - 1))

    async def push(version: int) -> None:
        source = TensorSource(trainer.named_weights(), 0)
        await publisher.publish({0: local_rank(sender, source, asyncio.to_thread)}, version)

    try:
        held: list[tuple[float, ...]] = []
        seconds: list[float] = []
        for number in range(rounds + 1):
            began = time.perf_counter()
            sender.unload()
            trim()
            if engine.asleep:
                await engine.wake_up()
            woken = time.perf_counter() - began
            await push(number)
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
            trainer.sft_step([text])
            held.append(tuple(value / GIB for value in (base, serving, asleep, trainer_idle, resident())))
        print(f"trainer before its model {trainer_base / GIB:.2f} GiB")
        first, last = held[1], held[-1]
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50)
    start_server()
    asyncio.run(play(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
