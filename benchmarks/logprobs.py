"""Log-probs over a large vocabulary: k2rl's slices beside the logits of all tokens at once.

Both sides give the log-probs of 8,192 targets over a vocabulary of 163,840, forward and backward, to the
hidden states and to the head; each in child processes of its own, which take turns, so that the peak of
memory is its own. The plain side is `log_softmax(hidden @ head.T)` and a gather, which holds three copies of
the logits (16 GB) at its peak. k2rl's gives each distribution's entropy, too; the plain side with
`--entropy`. First both are compared on fewer tokens: log-probs and gradients.

    make bench-logprobs                          about five minutes on two cores, and 18 GB of memory
    make bench-logprobs ARGS="--tokens 4096"     half of both
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from k2rl.training.logprobs import token_logprobs

SIDES = ("plain", "k2rl")
COMPARED_TOKENS = 256
BARS = {"time": 1.15, "memory": 1 / 8}


def problem(tokens: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets; logits have a standard deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator)
    head = torch.randn(vocabulary, hidden, generator=generator).mul_(hidden**-0.5)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return states.requires_grad_(), head.requires_grad_(), targets


def logprobs_of(side: str, states: Tensor, head: Tensor, targets: Tensor, entropy: bool) -> Tensor:
    if side == "k2rl":
        rows = torch.arange(len(targets))
        return token_logprobs(states, head, rows, targets, 1.0).logprobs
    logprobs = torch.log_softmax(states @ head.T, dim=-1)
    if entropy:
        with torch.no_grad():
            (logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(1, targets[:, None])[:, 0]


def differences(vocabulary: int, hidden: int) -> list[float]:
    """Largest difference of log-probs, and of both gradients relative to the largest entry."""
    found = []
    for side in SIDES:
        states, head, targets = problem(COMPARED_TOKENS, vocabulary, hidden)
        logprobs = logprobs_of(side, states, head, targets, entropy=False)
        gradients = torch.autograd.grad(
            logprobs.mul(torch.linspace(-1, 1, len(targets))).sum(), (states, head)
        )
        found.append((logprobs.detach(), *gradients))
    plain, ours = found
    absolute = float((plain[0] - ours[0]).abs().max())
    relative = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain[1:], ours[1:], strict=True)]
    return [absolute, *relative]


def resident(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def measure(side: str, tokens: int, vocabulary: int, hidden: int, entropy: bool) -> dict[str, float]:
    """In a process of its own."""
    inputs = problem(tokens, vocabulary, hidden)
    before, began, worked = resident("VmRSS"), time.perf_counter(), time.process_time()
    logprobs_of(side, *inputs, entropy).sum().backward()
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - worked,
        "peak": resident("VmHWM"),
        "added": resident("VmHWM") - before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=163_840)
    parser.add_argument("--hidden", type=int, default=576, help="size of the hidden states (SmolLM2's)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="with one, CPU time can be compared on a busy machine")
    parser.add_argument("--entropy", action="store_true", help="the plain side gives it, too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.tokens, arguments.vocabulary, arguments.hidden)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.side:
        print(json.dumps(measure(arguments.side, *shape, arguments.entropy)))
        return 0
    needed = 3.3 * 4 * arguments.tokens * arguments.vocabulary
    free = available()
    if free < needed:
        parser.error(
            f"the plain side needs {needed / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free: "
            "lower --tokens"
        )
    gaps = differences(arguments.vocabulary, arguments.hidden)
    print(
        f"{COMPARED_TOKENS} tokens: log-probs differ by {gaps[0]:.1e} at most, gradients by {gaps[1]:.1e} "
        f"(hidden states) and {gaps[2]:.1e} (head) of their largest entry",
        flush=True,
    )
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout)
            found[side].append(result)
            print(
                f"{side:>5}: {result['seconds']:.1f} s, {result['cpu']:.1f} s of CPU, "
                f"{result['peak'] / 2**30:.2f} GiB at most, {result['added'] / 2**30:.2f} beyond the inputs",
                flush=True,
            )
    ratios = {
        name: median(of["k2rl"][key] / of["plain"][key] for of in rounds_of(found))
        for name, key in (
            ("time", "seconds"),
            ("CPU time", "cpu"),
            ("memory", "peak"),
            ("memory beyond the inputs", "added"),
        )
    }
    for name, ratio in ratios.items():
        bar = f" (bar {BARS[name]:.3g})" if name in BARS else ""
        print(f"k2rl / plain, {name}: {ratio:.3f}{bar}")
    return int(any(ratios[name] > bar for name, bar in BARS.items()))


def rounds_of(found: dict[str, list[dict[str, float]]]) -> list[dict[str, dict[str, float]]]:
    return [dict(zip(found, results, strict=True)) for results in zip(*found.values(), strict=True)]


def available() -> int:
    """Bytes of the machine that can be had."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


if __name__ == "__main__":
    sys.exit(main())
