"""Pushes of adapters into a live vLLM beside pushes of all weights: bytes, seconds, and log-probs after them.

One trainer and one vLLM with SmolLM2-135M on this machine, in the dtypes given. Pushes of adapters whose
factors have changed take turns with pushes of everything into the same engine. After each, what vLLM samples
is scored by peft's forward pass in the trainer.

    make bench-lora                                bfloat16 and float32, rank 8, all linear layers
    make bench-lora ARGS="--rank 32 --targets q_proj v_proj"
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import mean, median

import torch

from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors, local_rank
from k2rl.checkpoint_engine.sender import Sender
from k2rl.config import CheckpointEngineConfig, InferenceConfig, LoraConfig
from k2rl.inference.engine import Sampling
from k2rl.inference.vllm import VLLMEngine
from k2rl.models.adapters import adapter_tensors
from k2rl.models.factors import is_factor
from k2rl.models.hub import resolve_model
from k2rl.training.engine import TrainEngine

PROMPTS = [[5 + number, 9, 17, 33] * 4 for number in range(16)]
TOKENS = 32


async def log_prob_gap(engine: VLLMEngine, trainer: TrainEngine) -> float:
    """Mean distance of vLLM's and the trainer's log-probs of sampled tokens, in nats."""
    done = await asyncio.gather(
        *(
            engine.generate(prompt, Sampling(1.0, TOKENS, seed=number))
            for number, prompt in enumerate(PROMPTS)
        )
    )
    sequences = [[*prompt, *each.token_ids] for prompt, each in zip(PROMPTS, done, strict=True)]
    scored = trainer.logprobs(sequences)
    return mean(
        abs(mine - theirs)
        for prompt, each, row in zip(PROMPTS, done, scored, strict=True)
        for mine, theirs in zip(row[len(prompt) - 1 :], each.logprobs, strict=True)
    )


@torch.no_grad()
def move(trainer: TrainEngine, size: float) -> None:
    """Give the factors other values; B's of this size."""
    for name, master in trainer._weights.named_masters():
        if ".lora_B." in name:
            master.copy_(size * torch.randn(master.shape))
    trainer._weights.publish()


async def measure(dtype: str, lora: LoraConfig, rounds: int) -> None:
    path = resolve_model("smollm2-135m")
    settings = InferenceConfig(max_model_len=512, kv_cache_gib=0.5)
    options = {"adapter_scale": lora.scale, "keeps_weights": True}
    engine = VLLMEngine(path, dtype, (), settings, seed=0, **options).start()
    trainer = TrainEngine(path, dtype, lora=lora)
    expected = expected_tensors(path, dtype) | adapter_tensors(path, lora, dtype)
    publisher = Publisher({"vLLM": engine}, CheckpointEngineConfig(strategy="delta"), expected)
    sender, version = Sender(0), 0
    # Where an adapter changes a weight by a hundredth of its size and by a tenth: a run's beginning and end.
    try:
        await publisher.start()
        seconds: dict[str, list[float]] = {"everything": [], "adapters": []}
        stalls: dict[str, list[float]] = {"everything": [], "adapters": []}
        nbytes: dict[str, int] = {}
        gaps: dict[float, list[float]] = {0.0: [], 0.001: [], 0.01: []}
        for number in range(rounds + 1):
            for kind in seconds:
                size = list(gaps)[number % len(gaps)]
                move(trainer, size)
                if kind == "everything":
                    publisher._held = None  # as after a push that failed
                rank = local_rank(sender, trainer.weights_source(), asyncio.to_thread)
                began = time.monotonic()
                report = await publisher.publish({0: rank}, version)
                version += 1
                nbytes[kind] = report.nbytes
                if number:  # the first of each works out its copies
                    seconds[kind].append(time.monotonic() - began)
                    stalls[kind].append(report.apply_s)
                gaps[size].append(await log_prob_gap(engine, trainer))
        shown = {kind: f"{nbytes[kind]:,} bytes, {median(seconds[kind]):.3f} s" for kind in seconds}
        print(f"{dtype}, rank {lora.rank}, {lora.target_modules or 'all linear layers'}: {shown}")
        print(
            f"  adapters / everything: bytes {nbytes['adapters'] / nbytes['everything']:.4f}, seconds "
            f"{median(seconds['adapters']) / median(seconds['everything']):.2f}, of a paused engine "
            f"{median(stalls['adapters']) / median(stalls['everything']):.2f} "
            f"({median(stalls['adapters']):.3f} s beside {median(stalls['everything']):.3f} s)"
        )
        weights = sum(tensor.numel() for name, tensor in trainer.named_weights() if not is_factor(name))
        held = trainer.state_bytes()
        print(f"  trainer: {sum(held.values()) / weights:.2f} bytes a parameter of the model, {held}")
        for size, found in gaps.items():
            print(f"  log-prob gap where B is about {size}: {mean(found):.6f} nats")
    finally:
        await publisher.close()
        trainer.close()
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    arguments = parser.parse_args()
    lora = LoraConfig(arguments.rank, 2.0 * arguments.rank, arguments.targets)
    for dtype in arguments.dtypes:
        asyncio.run(measure(dtype, lora, arguments.rounds))


if __name__ == "__main__":
    main()
