"""On a CUDA device: Muon's step, chunked log-probs and the attention probe beside torch's own.

Needs torch and transformers alone. Sides of a ratio take turns in one run, each figure is the median of some
rounds; rates stand beside ceilings measured in the same run: a copy in the device's memory, and plain
matrix products of the same shapes. Times are the device's (events), so they hold what Python costs where
that is what a kernel waits for.

    make bench-cuda                                     all of it, about three minutes on an H200
    make bench-cuda ARGS="--only muon --out muon.json"  one part: ceilings, muon, choice, probe, logprobs
                                                        or step; rows also as JSON
    make bench-cuda ARGS="--device cpu --small"         tries the code on a CPU; its figures say nothing
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_attention import probe
from gpu_bench import Bench, relative
from gpu_logprobs import logprobs
from gpu_step import step
from optim import LAYER, SMOLLM2, flops
from torch import Tensor, nn

from k2rl.config import OptimizerConfig
from k2rl.optim.matrices import boxes_of
from k2rl.optim.muon import MuonAdamW, build_optimizer
from k2rl.optim.newton_schulz import newton_schulz, orthogonalise

Named = Sequence[tuple[str, tuple[int, ...]]]

LR = 1e-3
STEPS = OptimizerConfig().ns_steps
BF16_CEILING = 8192


def ceilings(bench: Bench) -> None:
    size = 256 if bench.small else BF16_CEILING
    bench.row("ceilings", "copy in memory", {"GB/s": bench.copy_rate(2**20 if bench.small else 2**32)})
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        rate = bench.product(size, size, size, dtype)
        bench.row("ceilings", f"product {size}^3, {name}", {"TFLOP/s": rate})
    # Of Newton-Schulz, a slice of logits, and query blocks of attention.
    shapes = [
        (4096, 11008, 4096),
        (2048, 7168, 2048),
        (576, 1536, 576),
        (8192, 576, 16384),
        (8192, 7168, 16384),
    ]
    for n, k, m in [(64, 64, 64)] if bench.small else shapes:
        bench.row("ceilings", f"product {n} x {k} x {m}, bfloat16", {"TFLOP/s": bench.product(n, k, m)})


def muon_cases(small: bool) -> dict[str, Named]:
    """Parameters by name and shape."""

    def experts(layers: int, count: int, hidden: int, inner: int) -> Named:
        names = [f"layers.{layer}.mlp.experts" for layer in range(layers)]
        return [
            *((f"{name}.gate_up_proj", (count, 2 * inner, hidden)) for name in names),
            *((f"{name}.down_proj", (count, hidden, inner)) for name in names),
        ]

    def dense(layers: int, hidden: int, inner: int) -> Named:
        one = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        return [(f"{number}.weight", shape) for number, shape in enumerate(one * layers)]

    if small:
        return {
            "4 matrices 32 x 32": [(f"{i}.weight", (32, 32)) for i in range(4)],
            "experts": experts(1, 2, 32, 16),
        }
    return {
        "96 matrices 64 x 64": [(f"{i}.weight", (64, 64)) for i in range(96)],
        "2 layers of 16 experts 128 -> 64 -> 128": experts(2, 16, 128, 64),
        "SmolLM2-135M's 210 matrices": [
            (f"{i}.weight", shape) for i, shape in enumerate(LAYER * SMOLLM2["num_hidden_layers"])
        ],
        "4 layers, 4096 wide, 11008 inside": dense(4, 4096, 11008),
        "16 experts 7168 -> 2048 -> 7168 (K2's)": experts(1, 16, 7168, 2048),
    }


def muon(bench: Bench) -> None:
    size = 256 if bench.small else BF16_CEILING
    for what, named in muon_cases(bench.small).items():
        ours = [nn.Parameter(bench.random(*shape, scale=0.02)) for _, shape in named]
        for parameter in ours:
            parameter.grad = bench.random(*parameter.shape)
        optimizer = build_optimizer(
            zip([name for name, _ in named], ours, strict=True), OptimizerConfig(weight_decay=0.1), LR
        )
        places = [(index, box) for index, (name, shape) in enumerate(named) for box in boxes_of(name, shape)]
        theirs = [nn.Parameter(_at(ours[index], box).clone()) for index, box in places]
        for parameter, (index, box) in zip(theirs, places, strict=True):
            parameter.grad = _at(ours[index].grad, box).clone()
        reference = torch.optim.Muon(theirs, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        figures = _first_step(optimizer, reference, ours, theirs, places)
        taken = bench.in_turns({"k2rl": optimizer.step, "torch": reference.step})
        work = sum(flops(box.shape) for _, box in places)
        rate = work / taken["k2rl"] / 1e12
        bench.row(
            "muon",
            what,
            {
                "k2rl ms": taken["k2rl"] * 1e3,
                "torch.optim.Muon ms": taken["torch"] * 1e3,
                "torch / k2rl": taken["torch"] / taken["k2rl"],
                "TFLOP/s": rate,
                f"of {size}^3": rate / bench.product(size, size, size),
                **figures,
            },
        )
        momenta = [_at(optimizer.state[ours[index]]["momentum"], box) for index, box in places]
        alone = bench.in_turns({"ns": lambda momenta=momenta: orthogonalise(momenta, STEPS)})["ns"]
        rate = work / alone / 1e12
        bench.row(
            "muon",
            f"{what}, Newton-Schulz alone",
            {"ms": alone * 1e3, "TFLOP/s": rate, f"of {size}^3": rate / bench.product(size, size, size)},
        )
        del ours, theirs, optimizer, reference, momenta, parameter
        bench.free()


def _at(tensor: Tensor, box: object) -> Tensor:
    """A view of a matrix in a parameter."""
    stack = tensor.detach() if tensor.ndim == 3 else tensor.detach()[None]
    rows, columns = (slice(part.start, part.stop, part.step) for part in (box.rows, box.columns))
    return stack[box.expert, rows, columns]


def _first_step(
    optimizer: MuonAdamW, reference: torch.optim.Muon, ours: list, theirs: list, places: list
) -> dict[str, float]:
    """How far the first updates are apart, and each from the update with a float32 iteration."""
    shapes: dict[tuple[int, int], int] = {}
    for number, (_, box) in enumerate(places):
        shapes.setdefault(box.shape, number)
    before = {number: theirs[number].detach().clone() for number in shapes.values()}
    optimizer.step()
    reference.step()
    gaps, of_k2rl, of_torch = [], [], []
    for number, start in before.items():
        index, box = places[number]
        start *= 1 - LR * 0.1
        mine, other = start - _at(ours[index], box), start - theirs[number].detach()
        # At the first step momentum and gradient have one direction.
        exact = newton_schulz(theirs[number].grad, STEPS, torch.float32)
        exact *= LR * 0.2 * max(box.shape) ** 0.5
        gaps.append(relative(mine, other))
        of_k2rl.append(relative(mine, exact))
        of_torch.append(relative(other, exact))
    return {
        "updates differ by": max(gaps),
        "k2rl from float32": max(of_k2rl),
        "torch from float32": max(of_torch),
    }


def choice(bench: Bench) -> None:
    cases = [
        *[((32, 32), 96), ((64, 64), 96), ((64, 192), 64), ((128, 128), 96), ((128, 256), 64)],
        *[((256, 256), 48), ((192, 576), 60), ((576, 576), 60), ((576, 1536), 90), ((1024, 1024), 16)],
        *[((2048, 2048), 8), ((2048, 7168), 8), ((4096, 4096), 4)],
    ]
    for (n, m), count in [((16, 16), 3), ((16, 24), 3)] if bench.small else cases:
        group = [bench.random(n, m) for _ in range(count)]
        taken = bench.in_turns(
            {
                "loop": lambda group=group: orthogonalise(group, STEPS, batched=False),
                "batch": lambda group=group: orthogonalise(group, STEPS, batched=True),
            }
        )
        bench.row(
            "choice",
            f"{count} x {n} x {m}",
            {
                "loop ms": taken["loop"] * 1e3,
                "batch ms": taken["batch"] * 1e3,
                "loop / batch": taken["loop"] / taken["batch"],
                "batch TFLOP/s": count * flops((n, m)) / taken["batch"] / 1e12,
            },
        )


PARTS = {
    # With seconds that each takes on an H200 at most: one that would not fit is not begun.
    "ceilings": (ceilings, 15),
    "muon": (muon, 45),
    "choice": (choice, 15),
    "probe": (probe, 60),
    "logprobs": (logprobs, 75),
    "step": (step, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=300.0, help="a part that would not fit is left out")
    parser.add_argument("--out", type=Path, help="all rows as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --small tries the code on a CPU")
    bench = Bench(arguments.device, arguments.small, arguments.rounds, arguments.out)
    print(" | ".join(f"{name} {value}" for name, value in bench.facts.items()), f"| {os.cpu_count()} cores")
    for name, (part, longest) in PARTS.items():
        if arguments.only and name not in arguments.only:
            continue
        if not arguments.small and bench.elapsed() + longest > arguments.budget_s:
            bench.row(name, "left out", {"elapsed s": bench.elapsed(), "takes s at most": longest})
            continue
        print(f"{name} ({bench.elapsed():.0f} s)", flush=True)
        torch.set_float32_matmul_precision("highest")  # no TF32, unless a part asks for it
        part(bench)
        bench.free()
    print(f"{bench.elapsed():.0f} s in all")


if __name__ == "__main__":
    main()
