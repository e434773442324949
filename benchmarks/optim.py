"""Muon's step beside torch.optim.Muon's, Newton-Schulz beside plain matrix products, and its share of a step.

Every ratio's two sides take turns in one run; each figure is the median of several rounds. torch.optim.Muon
iterates in bfloat16 whatever the processor; it is also measured with that one cast replaced by float32, so
that the arithmetic is the same. The train step is a supervised one of SmolLM2-135M's shape (random weights).

    make bench-optim                       all of it, about four minutes on two cores
    make bench-optim ARGS="--only small"   one part: choice, small, large, smollm2 or step
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from k2rl.config import OptimizerConfig
from k2rl.hardware import fast_dtype
from k2rl.optim import muon
from k2rl.optim.muon import build_optimizer
from k2rl.optim.newton_schulz import CPU_BATCH_SIDE, orthogonalise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAST = fast_dtype(DEVICE.type == "cuda")
STEPS = 5
EMULATED_FLOPS = 5e9
"""More is not tried in bfloat16 on a processor that emulates it."""

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, after one round that does not count."""
    taken = [[seconds(run) for run in runs] for _ in range(rounds + 1)][1:]
    return [median(times) for times in zip(*taken, strict=True)]


def matrices(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def flops(shape: tuple[int, int]) -> float:
    """Of the iteration as published: two products with the long side and one without, a step."""
    short, long = min(shape), max(shape)
    return STEPS * (4.0 * short**2 * long + 2.0 * short**3)


def executed_flops(shape: tuple[int, int]) -> float:
    """Of the iteration as it runs in float32: long matrices iterate on their Gram matrix."""
    short, long = min(shape), max(shape)
    if FAST != "float32" or long < 2 * short:
        return flops(shape)
    return 4.0 * short**2 * long + 2.0 * short**3 * (STEPS + 3 * (STEPS - 1))


def choice() -> None:
    print(f"one at a time against batches, {FAST}; on a CPU k2rl batches up to a side of {CPU_BATCH_SIDE}")
    for shape, count in [
        *[((32, 32), 96), ((64, 64), 96), ((64, 192), 64), ((128, 128), 48), ((128, 256), 32)],
        *[((192, 576), 24), ((256, 256), 24), ((384, 384), 12), ((576, 576), 8), ((576, 1536), 6)],
    ]:
        group = matrices([shape] * count)
        loop, batch = in_turns(
            [lambda g=group, b=b: orthogonalise(g, STEPS, batched=b) for b in (False, True)], 5
        )
        rates = [count * flops(shape) / taken / 1e9 for taken in (loop, batch)]
        print(
            f"  {count:3d} x {shape[0]} x {shape[1]}: {loop * 1e3:8.2f} ms one at a time "
            f"({rates[0]:.0f} GFLOP/s), {batch * 1e3:8.2f} ms in a batch ({rates[1]:.0f}): "
            f"{loop / batch:.2f}x"
        )


@contextmanager
def torch_in_float32() -> Iterator[None]:
    """torch.optim.Muon with its iteration in float32."""
    original = torch.Tensor.bfloat16
    torch.Tensor.bfloat16 = lambda self: self.to(torch.float32, copy=True)
    try:
        yield
    finally:
        torch.Tensor.bfloat16 = original


@contextmanager
def iteration_in(dtype: torch.dtype) -> Iterator[None]:
    original = muon.default_dtype
    muon.default_dtype = lambda device: dtype
    try:
        yield
    finally:
        muon.default_dtype = original


def compare(
    what: str, named: Sequence[tuple[str, tuple[int, ...]]], apart: Sequence[tuple[int, int]]
) -> None:
    """k2rl's step over `named` parameters against torch.optim.Muon's over the same matrices `apart`."""
    ours = [nn.Parameter(value) for value in matrices([shape for _, shape in named])]
    theirs = [nn.Parameter(value) for value in matrices(apart)]
    for parameter in (*ours, *theirs):
        parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer(zip([name for name, _ in named], ours, strict=True), OptimizerConfig(), 1e-3)
    reference = torch.optim.Muon(theirs, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def within(context: Callable[[], object], step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with context():
                step()

        return run

    runs = [
        within(lambda: iteration_in(torch.bfloat16), optimizer.step),
        within(lambda: iteration_in(torch.float32), optimizer.step),
        reference.step,
        within(torch_in_float32, reference.step),
    ]
    ours32, theirs32 = in_turns(runs[1::2], 5)
    print(
        f"{what}, both in float32: k2rl {ours32 * 1e3:.1f} ms, torch {theirs32 * 1e3:.1f} ms: "
        f"{theirs32 / ours32:.2f}x"
    )
    if FAST == "float32" and len(apart) * flops(apart[0]) > EMULATED_FLOPS:
        print("  in bfloat16, which this processor emulates, a step takes some twenty seconds: not measured")
        return
    ours16, theirs16 = in_turns(runs[::2], 3)
    own = ours16 if FAST == "bfloat16" else ours32
    print(
        f"  both in bfloat16: k2rl {ours16 * 1e3:.1f} ms, torch {theirs16 * 1e3:.1f} ms: "
        f"{theirs16 / ours16:.2f}x; each as it comes (k2rl here in {FAST}): {theirs16 / own:.2f}x"
    )


def small() -> None:
    compare("96 matrices 64 x 64", [(f"{i}.weight", (64, 64)) for i in range(96)], [(64, 64)] * 96)
    experts, hidden, inner = 16, 128, 64
    names = [f"layers.{layer}.mlp.experts" for layer in range(2)]
    stacked = [(f"{name}.gate_up_proj", (experts, 2 * inner, hidden)) for name in names]
    stacked += [(f"{name}.down_proj", (experts, hidden, inner)) for name in names]
    apart = [(inner, hidden)] * (4 * experts) + [(hidden, inner)] * (2 * experts)
    compare(f"2 layers of {experts} experts {hidden} -> {inner} -> {hidden}", stacked, apart)


def large() -> None:
    for shape, count in (((768, 768), 2), ((576, 1536), 2)):
        name = f"{count} matrices {shape[0]} x {shape[1]}"
        compare(name, [(f"{i}.weight", shape) for i in range(count)], [shape] * count)


def smollm2() -> None:
    dtype = getattr(torch, FAST)
    shapes = LAYER * SMOLLM2["num_hidden_layers"]
    group = matrices(shapes)
    square = torch.randn(1536, 1536, device=DEVICE).to(dtype)
    product, iteration = in_turns([lambda: square @ square, lambda: orthogonalise(group, STEPS)], 3)
    peak = 2.0 * 1536**3 / product
    done, published = sum(map(executed_flops, shapes)), sum(map(flops, shapes))
    print(
        f"Newton-Schulz over SmolLM2's {len(shapes)} matrices, {FAST}: {iteration:.2f} s; "
        f"{done / iteration / 1e9:.0f} GFLOP/s done, {done / iteration / peak:.2f} of a 1536^3 product's "
        f"{peak / 1e9:.0f}; as published it would be {published / done:.2f} times the arithmetic"
    )


def step() -> None:
    from k2rl.training.engine import TrainEngine  # the rest needs torch and transformers alone
    from k2rl.training.supervised import SupervisedSequence

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(folder)
        engine = TrainEngine(folder, FAST, device=DEVICE.type)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(SMOLLM2["vocab_size"], (8, 512), generator=generator).tolist()
        batch = [SupervisedSequence(tuple(row), (False,) + (True,) * 511) for row in tokens]
        engine.sft_step(batch)
        for _ in range(2):
            took = engine.sft_step(batch)
            passes, update = took["forward_backward_s"], took["optimizer_s"]
            print(
                f"train step of 4096 tokens, SmolLM2-135M, {FAST}: {passes:.1f} s forward and backward, "
                f"{update:.1f} s optimizer: {update / (passes + update):.0%} of the step"
            )


PARTS = {"choice": choice, "small": small, "large": large, "smollm2": smollm2, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS)
    only = parser.parse_args().only
    print(f"{DEVICE.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, fast dtype {FAST}")
    for name, part in PARTS.items():
        if only in (None, name):
            part()


if __name__ == "__main__":
    main()
