"""What one push of weights contains: where each tensor lies and what its bytes must hash to."""

from __future__ import annotations

import msgspec


class TensorRecord(msgspec.Struct, frozen=True):
    """One tensor in the arena; `digest` is the xxh3-128 of its bytes, `dtype` torch's name (`bfloat16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    digest: str


class Manifest(msgspec.Struct, frozen=True):
    """A complete set of weights as version `version`, lying in the shared memory at `path`."""

    version: int
    path: str
    nbytes: int
    records: tuple[TensorRecord, ...]


class WeightTransferError(Exception):
    """A push that did not arrive as it was sent; the receiver must not serve."""
