"""What a set of weights consists of, and which trainer rank holds which rows of it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import msgspec

#: Bytes an element, by torch's name of the dtype.
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "float32": 4,
    "int32": 4,
    "float64": 8,
    "int64": 8,
}
#: What a checkpoint holds in float32 whatever its dtype: steps of a router's bias are below bfloat16's
#: resolution.
FLOAT32_SUFFIX = ".e_score_correction_bias"
#: How many differences an error spells out.
SHOWN_DIFFERENCES = 20


class ManifestError(ValueError):
    """A manifest that is not a complete set of weights, or not that of the model it should go into."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor as the checkpoint names it, whole; `dtype` is torch's name (`bfloat16`).

    Tensors of the same non-empty `unit` (a quantised weight and its scales) always travel in one bucket.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Length of dimension 0; a scalar is one row."""
        return self.shape[0] if self.shape else 1


class Shard(msgspec.Struct, frozen=True):
    """Rows `start` to `stop` of tensor number `tensor`, held by trainer rank `owner` (FSDP2 shards dim 0)."""

    tensor: int
    owner: int
    start: int
    stop: int


class Manifest(msgspec.Struct, frozen=True, dict=True):
    """A complete set of weights and its owners. The same rows may have several owners (replicas)."""

    tensors: tuple[TensorSpec, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def whole(cls, tensors: Iterable[TensorSpec], owner: int = 0) -> Manifest:
        """All of it held by one rank."""
        specs = tuple(tensors)
        return cls(specs, tuple(Shard(index, owner, 0, spec.rows) for index, spec in enumerate(specs)))

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """Ranks that hold anything, ascending."""
        return tuple(sorted({shard.owner for shard in self.shards}))

    @cached_property
    def shards_of(self) -> tuple[tuple[Shard, ...], ...]:
        """The shards of each tensor, in order of their first row."""
        by_tensor: list[list[Shard]] = [[] for _ in self.tensors]
        for shard in self.shards:
            by_tensor[shard.tensor].append(shard)
        return tuple(tuple(sorted(shards, key=lambda s: (s.start, s.owner))) for shards in by_tensor)

    def check(self) -> None:
        """Raises:
        ManifestError: a name appears twice, a dtype is unknown, or a row has no owner or is not there.
        """
        names = [spec.name for spec in self.tensors]
        problems = (
            [f"{name} appears twice" for name in sorted({n for n in names if names.count(n) > 1})]
            if len(set(names)) < len(names)
            else []
        )
        for spec, shards in zip(self.tensors, self.shards_of, strict=True):
            if spec.dtype not in ITEM_BYTES:
                problems.append(f"{spec.name}: unknown dtype {spec.dtype}")
            covered = 0
            for shard in shards:
                if not 0 <= shard.start <= shard.stop <= spec.rows:
                    problems.append(
                        f"{spec.name}: trainer rank {shard.owner} holds rows {shard.start} to {shard.stop} "
                        f"of {spec.rows}"
                    )
                if shard.start > covered:
                    break
                covered = max(covered, shard.stop)
            if covered < spec.rows:
                problems.append(f"{spec.name}: row {covered} of {spec.rows} has no owner")
        if problems:
            raise ManifestError(_listed(f"not a complete set of weights: {len(problems)} problems", problems))


def merge(parts: Sequence[Manifest]) -> Manifest:
    """One manifest of what each rank says it holds.

    Raises:
        ManifestError: ranks disagree about a tensor, or the whole is not complete.
    """
    index: dict[str, int] = {}
    specs: list[TensorSpec] = []
    shards: list[Shard] = []
    problems = []
    for part in parts:
        for spec in part.tensors:
            known = index.setdefault(spec.name, len(specs))
            if known == len(specs):
                specs.append(spec)
            elif specs[known] != spec:
                problems.append(f"{spec.name}: {_kind(specs[known])} and {_kind(spec)}")
        shards += [
            Shard(index[part.tensors[shard.tensor].name], shard.owner, shard.start, shard.stop)
            for shard in part.shards
        ]
    if problems:
        raise ManifestError(_listed(f"trainer ranks disagree about {len(problems)} tensors", problems))
    whole = Manifest(tuple(specs), tuple(shards))
    whole.check()
    return whole


def check_same_model(sent: Iterable[TensorSpec], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Compare what would be sent with what a model takes: `expected` maps names to dtype and shape.

    Raises:
        ManifestError: one error that lists what is missing, extra, or of another shape or dtype.
    """
    specs = {spec.name: spec for spec in sent}
    problems = [f"missing: {name}" for name in expected if name not in specs]
    problems += [f"extra: {name}" for name in specs if name not in expected]
    for name, (dtype, shape) in expected.items():
        spec = specs.get(name)
        if spec is not None and (spec.dtype, spec.shape) != (dtype, tuple(shape)):
            problems.append(f"{name}: sent {_kind(spec)}, the model takes {dtype}{list(shape)}")
    if problems:
        raise ManifestError(_listed(f"weights and model disagree in {len(problems)} places", problems))


def _kind(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def _listed(headline: str, problems: Sequence[str]) -> str:
    shown = "; ".join(problems[:SHOWN_DIFFERENCES])
    rest = len(problems) - SHOWN_DIFFERENCES
    return f"{headline}: {shown}" + (f"; and {rest} more" if rest > 0 else "")
