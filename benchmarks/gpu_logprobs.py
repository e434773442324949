"""Of `gpu.py`: log-probs over a large vocabulary, k2rl's slices beside the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gpu_bench import Bench, relative
from logprobs import BARS
from torch import Tensor

from k2rl.training.logprobs import token_logprobs

Side = Callable[[Tensor, Tensor, Tensor], Tensor]

EAGER_CHUNKS = (2**22, 2**25, 2**27)
COMPILED_CHUNKS = (2**22, 2**24, 2**25, 2**26, 2**27, 2**28)
WIDE_CHUNKS = (2**25, 2**26, 2**27, 2**28)
"""Where hidden states are wide, and products take most of the time."""


def plain(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax((states @ head.T).float(), dim=-1).gather(1, targets[:, None])[:, 0]


def cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((states @ head.T).float(), targets, reduction="none")


def in_slices(
    states: Tensor, head: Tensor, targets: Tensor, chunk: int | None, compiled: bool | None
) -> Tensor:
    rows = torch.arange(len(targets), device=targets.device)
    return token_logprobs(states, head, rows, targets, 1.0, chunk, compiled).logprobs


def others() -> dict[str, Side]:
    """Torch's own ways."""
    sides: dict[str, Side] = {"cross_entropy": cross_entropy}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        sides["linear_cross_entropy"] = lambda states, head, targets: (
            -F.linear_cross_entropy(states, head, targets, reduction="sum")
        )
    return sides


def slices(chunks: tuple[int, ...], compiled: bool) -> dict[str, Side]:
    how = "compiled" if compiled else "eager"
    return {
        f"k2rl, 2^{chunk.bit_length() - 1} {how}": partial(in_slices, chunk=chunk, compiled=compiled)
        for chunk in chunks
    }


def logprobs(bench: Bench) -> None:
    tokens, vocabulary = (64, 1024) if bench.small else (8192, 163_840)
    default = partial(in_slices, chunk=None, compiled=None)
    for compiled in (False, True):  # what is compiled comes last: the rows before are there if it fails
        for hidden in (16,) if bench.small else (576, 2048, 7168):
            states = bench.random(tokens, hidden, dtype=torch.bfloat16).requires_grad_()
            head = bench.random(vocabulary, hidden, dtype=torch.bfloat16, scale=hidden**-0.5).requires_grad_()
            targets = torch.randint(vocabulary, (tokens,), generator=bench.generator, device=bench.device)
            inputs = (states, head, targets)
            if compiled:
                chunks = WIDE_CHUNKS if hidden > 2048 else COMPILED_CHUNKS
                _compare(bench, {"plain": plain, "k2rl": default, **slices(chunks, True)}, inputs)
                _numerics(bench, inputs, default)
            else:
                _compare(bench, {"plain": plain, **others(), **slices(EAGER_CHUNKS, False)}, inputs)
            del states, head, targets, inputs
            bench.free()


def _compare(bench: Bench, sides: dict[str, Side], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward of each, beside the first."""
    states, head, _ = inputs

    def run(side: Side) -> None:
        states.grad = head.grad = None
        side(*inputs).sum().backward()

    runs = {name: partial(run, side) for name, side in sides.items()}
    taken = bench.in_turns(runs)
    peaks = {}
    for name, one in runs.items():
        states.grad = head.grad = None
        bench.free()
        peaks[name] = bench.peak(one)
    (tokens, hidden), vocabulary = states.shape, len(head)
    product = 2.0 * tokens * hidden * vocabulary
    ceiling = bench.product(tokens, hidden, min(16384, vocabulary))
    first = next(iter(sides))
    gradients = (states.nbytes + head.nbytes) / 2**30
    for name, seconds in taken.items():
        rate = (4 if name.startswith("k2rl") else 3) * product / seconds / 1e12
        bench.row(
            "logprobs",
            f"{tokens} x {vocabulary}, hidden {hidden}, {name}",
            {
                "ms": seconds * 1e3,
                f"/ {first} (bar {BARS['time']:.3g})": seconds / taken[first],
                "peak GiB": peaks[name],
                f"peak / {first} (bar {BARS['memory']:.3g})": peaks[name] / peaks[first],
                "peak / its, without gradients": (peaks[name] - gradients) / (peaks[first] - gradients),
                "TFLOP/s": rate,
                "of the product": rate / ceiling,
            },
        )


def _numerics(bench: Bench, inputs: tuple[Tensor, Tensor, Tensor], ours: Side) -> None:
    """Both sides against float32 on fewer tokens: log-probs (nats at most), and gradients (relative)."""
    states, head, targets = (tensor.detach() for tensor in inputs)
    states, targets = states[:512], targets[:512]
    weights = torch.linspace(-1, 1, len(targets), device=bench.device)

    def results(side: Side, dtype: torch.dtype) -> tuple[Tensor, ...]:
        a, b = (tensor.to(dtype).requires_grad_() for tensor in (states, head))
        found = side(a, b, targets)
        return found.detach(), *torch.autograd.grad((found * weights).sum(), (a, b))

    exact = results(plain, torch.float32)
    for name, side in (("plain", plain), ("k2rl", ours)):
        found = results(side, torch.bfloat16)
        bench.row(
            "logprobs",
            f"hidden {states.shape[1]}, {name} in bfloat16 from float32",
            {
                "log-probs": float((found[0] - exact[0]).abs().max()),
                "gradient of states": relative(found[1], exact[1]),
                "gradient of head": relative(found[2], exact[2]),
            },
        )
