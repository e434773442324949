"""From nothing to the first token, and tokens per second after it: processes spawned and forked, in turns.

Each side is a process of its own that imports what a worker imports, starts vLLM, gives it weights and
generates: what happens in `ColocatedWorker.start`, without Ray.

    make bench-start                      three rounds with SmolLM2-135M
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from statistics import median

SIDES = ("spawned", "forked")
PROMPTS, TOKENS, ROUNDS = 32, 64, 3


async def first_token_and_rate(began: float) -> tuple[float, float]:
    """Seconds since `began` to the first token, and tokens per second in the best of a few batches."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors, local_rank
    from k2rl.checkpoint_engine.sender import Sender, TensorSource
    from k2rl.config import CheckpointEngineConfig, InferenceConfig
    from k2rl.hardware import fast_dtype
    from k2rl.inference.engine import Sampling
    from k2rl.inference.vllm import VLLMEngine
    from k2rl.models.hub import resolve_model

    path, dtype = resolve_model("smollm2-135m"), fast_dtype(gpu=False)
    engine = VLLMEngine(path, dtype, (), InferenceConfig(max_model_len=512), seed=0).start()
    publisher = Publisher({"vLLM": engine}, CheckpointEngineConfig(), expected_tensors(path, dtype))
    try:
        await publisher.start()
        # Random weights do not end their answers early.
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        rank = local_rank(Sender(0), TensorSource(model.named_parameters(), 0), asyncio.to_thread)
        await publisher.publish({0: rank}, 0)
        prompts = [[5 + number, 9, 17, 33] * 8 for number in range(PROMPTS)]
        await engine.generate(prompts[0], Sampling(1.0, 1, seed=0))
        first = time.time() - began
        rates = []
        for _ in range(ROUNDS):
            start = time.monotonic()
            done = await asyncio.gather(*(engine.generate(p, Sampling(1.0, TOKENS, seed=0)) for p in prompts))
            rates.append(sum(len(each.token_ids) for each in done) / (time.monotonic() - start))
        return first, max(rates)
    finally:
        await publisher.close()
        engine.shutdown()


def play(side: str, began: float) -> None:
    from k2rl.inference import prefork, vllm

    if side == "spawned":
        vllm.adopt = vllm.start_server = lambda: None
    else:
        prefork.start_server()
    import k2rl.training.engine  # noqa: F401  (what a worker imports, too)

    print("RESULT", json.dumps(asyncio.run(first_token_and_rate(began))))


def measure(side: str) -> tuple[float, float]:
    command = [sys.executable, __file__, "--play", side, "--began", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not lines:
        sys.exit(f"{side}: {done.stderr}")
    first, rate = json.loads(lines[0].removeprefix("RESULT"))
    return first, rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--play", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        play(arguments.play, arguments.began)
        return
    measure("forked")  # files into the page cache
    ratios, rates = [], []
    for number in range(arguments.rounds):
        (slow, slow_rate), (fast, fast_rate) = (measure(side) for side in SIDES)
        ratios.append(slow / fast)
        rates.append(fast_rate / slow_rate)
        print(
            f"round {number + 1}: first token after {slow:.1f} s spawned, {fast:.1f} s forked, "
            f"{ratios[-1]:.2f}x; tokens/s {slow_rate:.0f} spawned, {fast_rate:.0f} forked, {rates[-1]:.2f}x",
            flush=True,
        )
    print(f"median: start {median(ratios):.2f}x as fast, tokens per second {median(rates):.2f}x")


if __name__ == "__main__":
    main()
