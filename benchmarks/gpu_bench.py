"""What `gpu.py` measures with: sides that take turns, peaks of memory, ceilings, and rows of figures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

Run = Callable[[], object]

ROUND_S = 0.02
"""Of one side in one round, at least, where calls are shorter: they are repeated."""


class Bench:
    """A device, the figures found on it, and how they are found."""

    def __init__(self, device: str, small: bool, rounds: int, out: Path | None) -> None:
        """Args:
        device: `cuda` or `cpu`, where nothing is claimed and the code can be tried.
        small: tiny sizes.
        rounds: of turns; the median counts.
        out: JSON of all rows, written anew at each.
        """
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self.small = small
        self.rounds = rounds
        self._out = out
        self._began = time.perf_counter()
        self.facts: dict[str, object] = {"torch": torch.__version__, "device": self._name()}
        self.rows: list[dict[str, object]] = []
        self.generator = torch.Generator(device=self.device).manual_seed(0)

    def _name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_cuda else "cpu"

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    def row(self, part: str, what: str, figures: Mapping[str, object]) -> None:
        """Print a row, and keep it."""
        self.rows.append({"part": part, "what": what, "at_s": round(self.elapsed(), 1), **figures})
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in figures.items())
        print(f"  {what}: {shown}", flush=True)
        if self._out:
            self._out.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal, made on the device."""
        made = torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)
        return made.mul_(scale) if scale != 1.0 else made

    def synchronise(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Run, calls: int = 1) -> float:
        """Of one call: by the device's clock on CUDA."""
        self.synchronise()
        if not self.on_cuda:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - began) / calls
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    def host_seconds(self, run: Run) -> float:
        """Until a call returns, while the device may be at work yet: where it takes as long, it waits."""
        self.synchronise()
        began = time.perf_counter()
        run()
        taken = time.perf_counter() - began
        self.synchronise()
        return taken

    def in_turns(self, runs: Mapping[str, Run]) -> dict[str, float]:
        """Median seconds of a call of each, which take turns after two calls that do not count."""
        calls = {}
        for name, run in runs.items():
            run()
            calls[name] = max(1, min(200, math.ceil(ROUND_S / max(self.seconds(run), 1e-6))))
        if self.small:
            calls = dict.fromkeys(runs, 1)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                taken[name].append(self.seconds(run, calls[name]))
        return {name: median(times) for name, times in taken.items()}

    def peak(self, run: Run) -> float:
        """GiB that a call takes at its peak, beyond what was there; NaN on a CPU, which does not tell."""
        if not self.on_cuda:
            run()
            return math.nan
        self.synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronise()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def free(self) -> None:
        """Give cached memory back between cases."""
        if self.on_cuda:
            torch.cuda.empty_cache()

    @cache  # noqa: B019 - there is one
    def product(self, n: int, k: int, m: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """TFLOP/s of a plain product [n, k] @ [k, m], measured once: the ceiling of what is made of it."""
        a, b = self.random(n, k, dtype=dtype), self.random(k, m, dtype=dtype)
        out = torch.empty(n, m, dtype=dtype, device=self.device)
        taken = self.in_turns({"product": lambda: torch.mm(a, b, out=out)})
        return 2.0 * n * k * m / taken["product"] / 1e12

    def copy_rate(self, nbytes: int) -> float:
        """GB/s of a copy in the device's memory, read and written."""
        source = torch.empty(nbytes // 4, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        taken = self.in_turns({"copy": lambda: target.copy_(source)})
        return 2.0 * source.nbytes / taken["copy"] / 1e9


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
