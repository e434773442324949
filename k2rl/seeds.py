"""Seeds for everything random, each a function of what it is for: nothing to save, nothing to replay."""

from __future__ import annotations

import zlib


def derive_seed(*parts: object) -> int:
    """A 31-bit seed for the thing that `parts` name, such as `(run seed, step, task id)`."""
    return zlib.crc32("/".join(map(str, parts)).encode()) & 0x7FFFFFFF
