"""A checkpoint on disk as what a rank sends: start-up, and engines that serve without a trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from k2rl.checkpoint_engine.disk import CheckpointSource, checkpoint_manifest
from k2rl.checkpoint_engine.manifest import Manifest
from k2rl.checkpoint_engine.pieces import Piece
from k2rl.checkpoint_engine.plan import Plan


class StoredWeights:
    """The share of a checkpoint that rank `rank` of `ranks` reads; together they read every byte once."""

    def __init__(self, folder: Path, dtype: str = "", rank: int = 0, ranks: int = 1) -> None:
        """
        Args:
            folder: of the checkpoint.
            dtype: what floating tensors become while they are read; empty: they stay as they are.
            rank: who we are.
            ranks: how many read together.

        Raises:
            ConfigError: a file of it is missing or damaged.
        """
        self._files = CheckpointSource(folder, dtype)
        whole = checkpoint_manifest(folder, ranks, dtype)
        self.manifest = Manifest(whole.tensors, tuple(shard for shard in whole.shards if shard.owner == rank))
        self._index = {spec.name: index for index, spec in enumerate(whole.tensors)}

    @property
    def identity(self) -> object:
        return id(self)

    @property
    def frozen(self) -> Collection[str]:
        return ()

    def copier(self, plan: Plan, pieces: Sequence[Piece]) -> Callable[[], None]:
        """See `Source`; a piece that is not whole rows is read with the rest of its rows."""

        def read() -> None:
            for piece in pieces:
                self._read(plan, piece)

        return read

    def _read(self, plan: Plan, piece: Piece) -> None:
        spec = plan.tensors[piece.tensor]
        start, stop = piece.box[0] if piece.box else (0, 1)
        if all(cut == (0, length) for cut, length in zip(piece.box[1:], spec.shape[1:], strict=True)):
            self._files.write(self._index[spec.name], start, stop, piece.memory.numpy().data)
            return
        rows = torch.empty((stop - start, *spec.shape[1:]), dtype=getattr(torch, spec.dtype))
        raw = rows.view(-1).view(torch.uint8).numpy().data
        self._files.write(self._index[spec.name], start, stop, raw)
        for dimension, (first, last) in enumerate(piece.box[1:], 1):
            rows = rows.narrow(dimension, first, last - first)
        piece.memory.view(rows.dtype).view(rows.shape).copy_(rows)

    def close(self) -> None:
        """Close the files."""
        self._files.close()
