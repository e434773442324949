"""What this machine's processor can do. Imports nothing heavy."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As /proc/cpuinfo spells them; `bf16` is Arm's."""


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products.

    Without them libraries emulate: matrix products run at a tenth of float32's speed, or less.
    """
    return _CPUINFO.exists() and has_bfloat16_flag(_CPUINFO.read_text())


def has_bfloat16_flag(cpuinfo: str) -> bool:
    """Whether a processor of this /proc/cpuinfo text lists bfloat16 instructions."""
    lines = [line.split(":", 1)[1] for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    return bool(_BFLOAT16_FLAGS & {flag for line in lines[:1] for flag in line.split()})


def fast_dtype(gpu: bool) -> str:
    """The compute dtype to choose here: `bfloat16` where the hardware multiplies it, else `float32`."""
    return "bfloat16" if gpu or cpu_multiplies_bfloat16() else "float32"
