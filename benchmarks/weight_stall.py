"""How long a live vLLM stands still for new weights, beside restarting it, in one run.

SmolLM2-135M is served to requests that go on before, during and after the pushes. The stall is the time from
the call that pauses generation to its resumption: receive, check, place, vote, commit. Restarting is stopping
the engine, starting another and giving it the weights.

    make bench-stall                     seven pushes and one restart
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from k2rl.checkpoint_engine.messages import Address
from k2rl.checkpoint_engine.plan import Needs
from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors, local_rank
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.config import CheckpointEngineConfig, InferenceConfig
from k2rl.hardware import fast_dtype
from k2rl.inference.engine import Sampling
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.hub import resolve_model

REQUESTS = 16
LONG = 64


class Timed:
    """An engine whose stalls are timed."""

    def __init__(self, engine: VLLMEngine) -> None:
        self.engine = engine
        self.num_receivers, self.host = engine.num_receivers, engine.host
        self.stalls: list[float] = []

    @property
    def needs(self) -> Sequence[Needs] | None:
        return self.engine.needs

    async def join_push(self, address: Address, version: int, deadline_s: float, first_receiver: int) -> None:
        self._paused = time.monotonic()
        await self.engine.join_push(address, version, deadline_s, first_receiver)

    async def push_ended(self) -> None:
        await self.engine.push_ended()

    async def push_settled(self) -> BaseException | None:
        outcome = await self.engine.push_settled()
        self.stalls.append(time.monotonic() - self._paused)
        return outcome


async def serve(pushes: int, dtype: str) -> None:
    path = resolve_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    source = TensorSource(model.named_parameters(), rank=0)
    config = InferenceConfig(max_model_len=512)

    def start() -> VLLMEngine:
        return VLLMEngine(path, dtype, (), config, seed=0).start()

    engine = start()
    timed = Timed(engine)
    publisher = Publisher({"vLLM": timed}, CheckpointEngineConfig(), expected_tensors(path, dtype))
    await publisher.start()
    print(f"{source.manifest.nbytes / 1e6:.0f} MB in {len(source.manifest.tensors)} tensors, {dtype}")
    rank = local_rank(Sender(0), source, asyncio.to_thread)
    await publisher.publish({0: rank}, 0)
    for version in range(1, pushes + 1):
        requests = [
            asyncio.create_task(engine.generate([5, 9, 17, 33 + index], Sampling(1.0, LONG)))
            for index in range(REQUESTS)
        ]
        await engine.generate([5, 9], Sampling(1.0, 8))
        report = await publisher.publish({0: rank}, version)
        spans = [len((await request).weight_spans) for request in requests]
        print(
            f"push {version}: stall {timed.stalls[-1]:.3f} s, copying out before it {report.stage_s:.3f} s; "
            f"{sum(n > 1 for n in spans)} of {REQUESTS} requests went on across it",
            flush=True,
        )
    started = time.monotonic()
    engine.shutdown()
    await publisher.close()
    again = start()
    second = Publisher({"vLLM": again}, CheckpointEngineConfig(), expected_tensors(path, dtype))
    await second.start()
    await second.publish({0: rank}, 0)
    restart = time.monotonic() - started
    await second.close()
    again.shutdown()
    # The first push learns where everything goes.
    stall = median(timed.stalls[1:])
    print(
        f"stall: median {stall:.3f} s; restart with the same weights {restart:.1f} s; {restart / stall:.0f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pushes", type=int, default=7)
    parser.add_argument("--dtype", default=fast_dtype(gpu=False), choices=("bfloat16", "float32"))
    args = parser.parse_args()
    asyncio.run(serve(args.pushes, args.dtype))


if __name__ == "__main__":
    main()
