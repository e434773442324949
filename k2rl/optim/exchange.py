"""Bring sharded matrices together, each on one rank, and what came of them back to the shards.

Newton-Schulz needs a matrix whole. FSDP2 leaves every rank with some rows of each (or, of stacked experts,
some matrices whole). So ranks take turns in no order but cost: each matrix is gathered on one rank, which
works on it while the others work on theirs, and returns to every rank the part that it holds. Matrices go
in waves: one message to each rank for all matrices of a wave, and the next wave is on its way while this
one is worked on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from k2rl.optim.matrices import Box

WAVE_ELEMENTS = 32 * 2**20
"""Elements of all matrices in a wave, for each rank: what a rank has in a message at a time."""


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a matrix."""

    #: Index into the rank's shard, seen as [experts, rows, columns]; one of two dimensions is one expert.
    in_shard: tuple[int, slice, slice]
    in_matrix: tuple[slice, slice]
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Matrix:
    """A matrix of a parameter, the pieces that ranks hold of it, and the rank that works on it."""

    parameter: int
    shape: tuple[int, int]
    #: By rank; None where a rank holds nothing of it.
    pieces: tuple[Piece | None, ...]
    worker: int

    @cached_property
    def is_whole(self) -> bool:
        """Whether its worker has all of it already."""
        return all((piece is None) == (rank != self.worker) for rank, piece in enumerate(self.pieces))


@dataclass(frozen=True)
class Sharding:
    """Where a parameter's shards are: along one dimension of [experts, rows, columns], over one group."""

    group: dist.ProcessGroup | None
    rank: int
    ranks: int
    dim: int

    @property
    def across(self) -> Sharding:
        """The ranks alone: equal for parameters whose matrices can travel together."""
        return replace(self, dim=0)

    @classmethod
    def of(cls, parameter: Tensor) -> Sharding:
        """Replicated parameters count as whole: each replica works on its own, with the same result.

        Raises:
            ValueError: for a parameter that is sharded over more than one dimension of its mesh.
        """
        if not isinstance(parameter, DTensor):
            return cls(None, 0, 1, 0)
        placements = parameter.placements
        sharded = [(axis, p) for axis, p in enumerate(placements) if not isinstance(p, Replicate)]
        if not sharded:
            return cls(None, 0, 1, 0)
        (axis, placement), *others = sharded
        if others or type(placement) is not Shard:
            raise ValueError(f"Muon takes parameters sharded along one dimension, not {placements}")
        mesh = parameter.device_mesh
        dim = placement.dim % parameter.ndim + (3 - parameter.ndim)
        return cls(mesh.get_group(axis), mesh.get_local_rank(axis), mesh.size(axis), dim)

    def bounds(self, size: int) -> list[tuple[int, int]]:
        """[first, last) of each rank's shard of a dimension: torch.chunk's, so the last may be empty."""
        chunk = -(-size // self.ranks)
        return [(min(rank * chunk, size), min((rank + 1) * chunk, size)) for rank in range(self.ranks)]


def rows_held(parameter: Tensor) -> tuple[int, int]:
    """[first, last) of a parameter's first dimension, as far as this rank holds it."""
    sharding = Sharding.of(parameter)
    if sharding.ranks == 1 or sharding.dim != 3 - parameter.ndim:
        return 0, parameter.shape[0]
    return sharding.bounds(parameter.shape[0])[sharding.rank]


def plan_waves(
    shapes: Sequence[tuple[int, ...]],
    boxes: Sequence[Sequence[Box]],
    shardings: Sequence[Sharding],
    wave_elements: int | None = None,
) -> list[list[Matrix]]:
    """The matrices of parameters that share a group, with their workers, in waves; the same on all ranks.

    Args:
        shapes: of whole parameters.
        boxes: the matrices of each.
        shardings: of each.
        wave_elements: for each rank, default `WAVE_ELEMENTS`; a matrix that is larger has a wave of its own.
    """
    limit = (wave_elements or WAVE_ELEMENTS) * shardings[0].ranks
    ranks = shardings[0].ranks
    found = [
        (index, box.shape, _pieces(box, shapes[index], shardings[index]))
        for index in range(len(shapes))
        for box in boxes[index]
    ]
    found.sort(key=lambda matrix: -_cost(matrix[1]))  # stable: dear ones first, so that loads even out
    load = [0] * ranks
    holders = [[rank for rank, piece in enumerate(pieces) if piece] for _, _, pieces in found]
    for (_, shape, _), ranks_with_some in zip(found, holders, strict=True):
        if len(ranks_with_some) == 1:
            load[ranks_with_some[0]] += _cost(shape)
    waves: list[list[Matrix]] = [[]]
    elements = 0
    for (index, shape, pieces), ranks_with_some in zip(found, holders, strict=True):
        if len(ranks_with_some) == 1:
            worker = ranks_with_some[0]
        else:
            worker = min(range(ranks), key=load.__getitem__)
            load[worker] += _cost(shape)
        elements += shape[0] * shape[1]
        if waves[-1] and elements > limit:
            waves.append([])
            elements = shape[0] * shape[1]
        waves[-1].append(Matrix(index, shape, pieces, worker))
    return waves


def run_waves(
    waves: Sequence[Sequence[Matrix]],
    sharding: Sharding,
    take: Callable[[Sequence[Matrix], Sequence[Piece]], list[Tensor]],
    work: Callable[[list[Tensor]], list[Tensor]],
    give: Callable[[Sequence[Matrix], Sequence[Piece], list[Tensor]], None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Work on all matrices; a collective of the group.

    Args:
        waves: from `plan_waves`.
        sharding: any of the parameters' own: its group and this rank.
        take: this rank's pieces of matrices; any dtype, any strides.
        work: from whole matrices [rows, columns] to results of their shapes.
        give: takes results for this rank's pieces.
        dtype: in which pieces travel.
        device: of the messages.
    """
    parts = [_Wave(wave, sharding, dtype, device) for wave in waves]
    parts[0].gather(take)
    for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
        if after:
            after.gather(take)  # on its way while this one is worked on
        part.scatter(work(part.matrices()))
        if before:
            before.finish(give)  # its results were on their way meanwhile
    parts[-1].finish(give)


class _Wave:
    """One wave of matrices on this rank."""

    def __init__(
        self, matrices: Sequence[Matrix], sharding: Sharding, dtype: torch.dtype, device: torch.device
    ) -> None:
        rank = sharding.rank
        self._sharding, self._rank, self._dtype, self._device = sharding, rank, dtype, device
        self._whole = [matrix for matrix in matrices if matrix.is_whole and matrix.worker == rank]
        self._spread = [matrix for matrix in matrices if not matrix.is_whole]
        self._mine = [matrix for matrix in self._spread if matrix.worker == rank]
        #: What goes where on the way out, in the order of the message: ranks, then matrices.
        self._sent = [
            (matrix, piece)
            for worker in range(sharding.ranks)
            for matrix in self._spread
            if matrix.worker == worker and (piece := matrix.pieces[rank])
        ]
        self._received = [
            (index, other, piece)
            for other in range(sharding.ranks)
            for index, matrix in enumerate(self._mine)
            if (piece := matrix.pieces[other])
        ]

    def gather(self, take: Callable[[Sequence[Matrix], Sequence[Piece]], list[Tensor]]) -> None:
        self._directions = take(self._whole, [_held(matrix, self._rank) for matrix in self._whole])
        if not self._spread:
            return
        pieces = take([matrix for matrix, _ in self._sent], [piece for _, piece in self._sent])
        outgoing = self._message(piece.size for _, piece in self._sent)
        for slot, piece in zip(self._slots(outgoing, (p.size for _, p in self._sent)), pieces, strict=True):
            slot.view_as(piece).copy_(piece)
        self._incoming = self._message(piece.size for _, _, piece in self._received)
        self._waiting = self._exchange(self._incoming, outgoing, back=False)

    def matrices(self) -> list[Tensor]:
        """What this rank works on: first what it held whole, then what was gathered."""
        if not self._spread:
            return self._directions
        self._wait()
        gathered = [self._message([math.prod(matrix.shape)]).view(matrix.shape) for matrix in self._mine]
        slots = self._slots(self._incoming, (piece.size for _, _, piece in self._received))
        for slot, (index, _, piece) in zip(slots, self._received, strict=True):
            gathered[index][piece.in_matrix] = slot.view(piece.shape)
        return self._directions + gathered

    def scatter(self, results: list[Tensor]) -> None:
        self._results, gathered = results[: len(self._whole)], results[len(self._whole) :]
        if not self._spread:
            return
        outgoing = self._message(piece.size for _, _, piece in self._received)
        slots = self._slots(outgoing, (piece.size for _, _, piece in self._received))
        for slot, (index, _, piece) in zip(slots, self._received, strict=True):
            slot.view(piece.shape).copy_(gathered[index][piece.in_matrix])
        self._incoming = self._message(piece.size for _, piece in self._sent)
        self._waiting = self._exchange(self._incoming, outgoing, back=True)

    def finish(self, give: Callable[[Sequence[Matrix], Sequence[Piece], list[Tensor]], None]) -> None:
        give(self._whole, [_held(matrix, self._rank) for matrix in self._whole], self._results)
        if not self._spread:
            return
        self._wait()
        slots = self._slots(self._incoming, (piece.size for _, piece in self._sent))
        returned = [slot.view(piece.shape) for slot, (_, piece) in zip(slots, self._sent, strict=True)]
        give([matrix for matrix, _ in self._sent], [piece for _, piece in self._sent], returned)
        del self._incoming

    def _exchange(self, incoming: Tensor, outgoing: Tensor, back: bool) -> dist.Work:
        to_workers, from_holders = [0] * self._sharding.ranks, [0] * self._sharding.ranks
        for matrix, piece in self._sent:
            to_workers[matrix.worker] += piece.size
        for _, other, piece in self._received:
            from_holders[other] += piece.size
        receive, send = (to_workers, from_holders) if back else (from_holders, to_workers)
        work: dist.Work = dist.all_to_all_single(
            incoming, outgoing, receive, send, group=self._sharding.group, async_op=True
        )
        self._outgoing = outgoing  # must live until it has been sent
        return work

    def _wait(self) -> None:
        self._waiting.wait()
        del self._outgoing

    def _message(self, sizes: Iterable[int]) -> Tensor:
        return torch.empty(sum(sizes), dtype=self._dtype, device=self._device)

    @staticmethod
    def _slots(message: Tensor, sizes: Iterable[int]) -> tuple[Tensor, ...]:
        slots: tuple[Tensor, ...] = message.split(list(sizes))
        return slots


def _held(matrix: Matrix, rank: int) -> Piece:
    piece = matrix.pieces[rank]
    assert piece is not None
    return piece


def _cost(shape: tuple[int, int]) -> int:
    """Of Newton-Schulz, in arbitrary units."""
    return min(shape) ** 2 * max(shape)


def _pieces(box: Box, shape: tuple[int, ...], sharding: Sharding) -> tuple[Piece | None, ...]:
    """What each rank holds of a matrix."""
    if sharding.ranks == 1:
        return (_piece(box, [(0, size) for size in _as_three(shape)]),)
    pieces = []
    for low, high in sharding.bounds(_as_three(shape)[sharding.dim]):
        bounds = [(0, size) for size in _as_three(shape)]
        bounds[sharding.dim] = (low, high)
        pieces.append(_piece(box, bounds))
    return tuple(pieces)


def _piece(box: Box, bounds: Sequence[tuple[int, int]]) -> Piece | None:
    """The part of a matrix inside a shard with these bounds along [experts, rows, columns]."""
    (first, last), row_bounds, column_bounds = bounds
    rows, columns = _within(box.rows, *row_bounds), _within(box.columns, *column_bounds)
    if not (first <= box.expert < last and rows and columns):
        return None
    (rows_here, rows_there), (columns_here, columns_there) = rows, columns
    shape = (rows_there.stop - rows_there.start, columns_there.stop - columns_there.start)
    return Piece((box.expert - first, rows_here, columns_here), (rows_there, columns_there), shape)


def _within(part: range, low: int, high: int) -> tuple[slice, slice] | None:
    """Where the members of `part` in [low, high) are: in [low, high), and in `part`."""
    first = max(0, -(-(low - part.start) // part.step))
    last = min(len(part), -(-(high - part.start) // part.step))
    if first >= last:
        return None
    return slice(part[first] - low, part[last - 1] - low + 1, part.step), slice(first, last)


def _as_three(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if len(shape) == 2 else shape
