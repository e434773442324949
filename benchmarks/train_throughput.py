"""Tokens per second of a train step: k2rl's packed rows beside plain transformers with padding.

A model of SmolLM2-135M's shape (random weights) reads 8,192 tokens in sequences of lognormal lengths; each
token but the first is learned: forward and backward, in the dtype that the processor is fast at. Plain is
`LlamaForCausalLM(input_ids, attention_mask, labels).loss` with transformers' own attention (SDPA), four
sequences at a time in the order in which they are drawn, padded to the longest of them (eight do not fit into
24 GB); "sorted" is the same with sequences of like lengths together. k2rl's is a `sft_step` in one row. All
take turns, with one set of weights; loss and gradient norm are compared.

    make bench-train                          some five minutes on two cores
    make bench-train ARGS="--tokens 2048"
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from optim import SMOLLM2
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from k2rl.config import OptimizerConfig
from k2rl.hardware import fast_dtype
from k2rl.training.engine import TrainEngine
from k2rl.training.supervised import SupervisedSequence

BAR = 1.5
SHAPE = SMOLLM2 | {"initializer_range": 0.04}
MEDIAN, SIGMA, SHORTEST, LONGEST = 150, 0.8, 16, 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sequences(tokens: int) -> list[list[int]]:
    """Random ones, `tokens` in all; the last is cut to fit."""
    draw, found, left = random.Random(0), [], tokens
    while left:
        length = round(draw.lognormvariate(0, SIGMA) * MEDIAN)
        length = min(max(length, SHORTEST), LONGEST, left)
        found.append([draw.randrange(SHAPE["vocab_size"]) for _ in range(length)])
        left -= length
    return found


def padded(batch: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, batch))

    def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=DEVICE)

    return {
        "input_ids": filled(batch, 0),
        "labels": filled(batch, -100),
        "attention_mask": filled([[1] * len(row) for row in batch], 0),
    }


class Step(NamedTuple):
    seconds: float
    #: Of all threads.
    cpu: float
    loss: float
    grad_norm: float


def plain_step(model: LlamaForCausalLM, batch: Sequence[Sequence[int]], at_once: int) -> Step:
    """Forward and backward."""
    labels = sum(len(row) - 1 for row in batch)
    model.zero_grad()
    began, worked, total = time.perf_counter(), time.process_time(), 0.0
    for start in range(0, len(batch), at_once):
        inputs = padded(batch[start : start + at_once])
        loss = model(**inputs, num_items_in_batch=labels, use_cache=False).loss
        loss.backward()
        total += float(loss.detach())
    took, cpu = time.perf_counter() - began, time.process_time() - worked
    return Step(took, cpu, total, float(torch.nn.utils.clip_grad_norm_(model.parameters(), torch.inf)))


def packed_step(engine: TrainEngine, texts: Sequence[SupervisedSequence]) -> Step:
    """The same, whose CPU time has the optimizer's (AdamW) in it; weights stay as they are."""
    worked = time.process_time()
    learned = engine.sft_step(texts, lr=0.0)
    cpu = time.process_time() - worked
    return Step(learned["forward_backward_s"], cpu, learned["loss"], learned["grad_norm"])


def padding(batch: Sequence[Sequence[int]], at_once: int) -> float:
    """Positions that are computed, as a multiple of the tokens."""
    parts = [batch[start : start + at_once] for start in range(0, len(batch), at_once)]
    return sum(len(part) * max(map(len, part)) for part in parts) / sum(map(len, batch))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="of the model's 30")
    parser.add_argument("--at-once", type=int, default=4, help="sequences that are padded to one length")
    parser.add_argument("--threads", type=int, default=0, help="with one, CPU time can be compared")
    arguments = parser.parse_args()
    at_once = arguments.at_once
    drawn = sequences(arguments.tokens)
    by_length = sorted(drawn, key=len)
    dtype = fast_dtype(DEVICE == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": arguments.layers})).save_pretrained(
            folder
        )
        engine = TrainEngine(
            folder,
            dtype,
            OptimizerConfig(name="adamw"),
            arguments.tokens,
            num_threads=arguments.threads,
            device=DEVICE,
        )
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(DEVICE)
    print(
        f"{DEVICE}, {dtype}: {len(drawn)} sequences of {min(map(len, drawn))} to {max(map(len, drawn))} "
        f"tokens; padded, {padding(drawn, at_once):.2f} positions a token, "
        f"sorted {padding(by_length, at_once):.2f}",
        flush=True,
    )
    texts = [SupervisedSequence(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in drawn]
    sides = {"k2rl": lambda: packed_step(engine, texts), "plain": lambda: plain_step(plain, drawn, at_once)}
    if len(drawn) > at_once:
        sides["sorted"] = lambda: plain_step(plain, by_length, at_once)
    ratios: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        steps: dict[str, Step] = {}
        for name, run in sides.items():
            step = steps[name] = run()
            print(
                f"round {number}, {name}: {arguments.tokens / step.seconds:.0f} tokens a second, "
                f"{step.cpu:.1f} s of CPU; loss {step.loss:.5f}, gradient norm {step.grad_norm:.5f}",
                flush=True,
            )
        ours = steps.pop("k2rl")
        for name, step in steps.items():
            ratios.setdefault(name, []).append(step.seconds / ours.seconds)
            ratios.setdefault(f"{name}, CPU time", []).append(step.cpu / ours.cpu)
    for name, of_rounds in ratios.items():
        bar = f" (bar {BAR})" if name == "plain" else ""
        print(f"k2rl / {name}: {median(of_rounds):.2f}x{bar}")
    return int(median(ratios["plain"]) < BAR)


if __name__ == "__main__":
    sys.exit(main())
