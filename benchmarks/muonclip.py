"""MuonClip against Muon: how attention logits grow, how many heads are clipped, and what it does to the loss.

A Llama of two layers with four heads learns to repeat what it has read, which needs attention, at a learning
rate that is too high for it. Both optimizers see the same batches from the same weights; Muon's logits are
measured and never clipped. K2's report shows the same on models of billions of parameters, tau = 100.

    make bench-muonclip                          three seeds
    make bench-muonclip ARGS="--plot docs/muonclip.svg"
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from statistics import mean

import torch
from panels import Panel, draw
from transformers import LlamaConfig, LlamaForCausalLM

from k2rl.config import OptimizerConfig
from k2rl.training.engine import TrainEngine
from k2rl.training.supervised import SupervisedSequence

VOCABULARY, HALF = 64, 16
UNREACHED = 1e30
Run = list[dict[str, float]]


def save_model(folder: str, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def batch(seed: int) -> list[SupervisedSequence]:
    """Sixteen tokens and the same again; the second half is to be learned."""
    rng = random.Random(seed)
    halves = [tuple(rng.randrange(3, VOCABULARY) for _ in range(HALF)) for _ in range(16)]
    return [SupervisedSequence(half + half, (False,) * HALF + (True,) * HALF) for half in halves]


def train(seed: int, tau: float, lr: float, steps: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, seed)
        engine = TrainEngine(folder, "float32", OptimizerConfig(lr=lr, qk_clip=tau), seed=seed, num_threads=1)
        return [engine.sft_step(batch(1000 * seed + step)) for step in range(steps)]


def plot(runs: dict[str, list[Run]], file: Path) -> None:
    def panel(title: str, metric: str, log: bool = False) -> Panel:
        curves = {name: [[row[metric] for row in run] for run in of] for name, of in runs.items()}
        return Panel(title, curves, first=1, log=log)

    draw(
        [
            panel("largest attention logit", "qk_clip/max_logit", log=True),
            panel("share of heads clipped", "qk_clip/clipped_share"),
            panel("loss (nats a token)", "loss"),
        ],
        file,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tau", type=float, default=100.0)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {"Muon": [], f"MuonClip, tau {args.tau:g}": []}
    for seed in range(args.seeds):
        for (name, of_seeds), tau in zip(runs.items(), (UNREACHED, args.tau), strict=True):
            run = train(seed, tau, args.lr, args.steps)
            of_seeds.append(run)
            largest = [row["qk_clip/max_logit"] for row in run]
            clipped = [row["qk_clip/clipped_share"] for row in run]
            losses = [row["loss"] for row in run]
            print(
                f"seed {seed}, {name}: largest logit {max(largest):.0f}, at the end {largest[-1]:.0f}; "
                f"heads clipped {mean(clipped):.1%} of the time, {mean(clipped[-20:]):.1%} at the end; "
                f"loss {losses[0]:.2f} -> {mean(losses[-20:]):.3f}",
                flush=True,
            )
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
