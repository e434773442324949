"""A Hugging Face checkpoint as a source of weights: ranks read their rows straight into place. No torch.

Of N ranks each reads 1/N of the bytes, in the order in which they lie in the files: together they read the
checkpoint once, and the push that follows brings everything to everyone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import msgspec

from k2rl.checkpoint_engine.manifest import FLOAT32_SUFFIX, ITEM_BYTES, Manifest, Shard, TensorSpec
from k2rl.errors import ConfigError
from k2rl.models.hub import index_of, weight_files

#: Names of dtypes in the files' headers, and torch's.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "F32": "float32",
    "I32": "int32",
    "F64": "float64",
    "I64": "int64",
}
#: What `dtype` may replace. 8-bit floats are quantised weights: their numbers mean nothing without their
#: scales.
CONVERTIBLE = frozenset({"bfloat16", "float16", "float32", "float64"})
#: Longer headers are refused, here as by the safetensors library.
LONGEST_HEADER = 100_000_000
#: Elements that are converted at a time.
CONVERTED_AT_ONCE = 1 << 22


class StoredTensor(msgspec.Struct, frozen=True):
    """Where a tensor lies: its first byte in its file, and what it is there."""

    file: Path
    offset: int
    spec: TensorSpec


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of a checkpoint, in the order in which they lie in its files, from the headers alone.

    Raises:
        ConfigError: one line that names the file that is missing, too short, or has a header that cannot be
        true.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in _read_header(file):
            if earlier := found.get(tensor.spec.name):
                raise _damaged(file, f"{tensor.spec.name} is in {earlier.file.name} too")
            found[tensor.spec.name] = tensor
    for name, file_name in index_of(folder).items():
        if name not in found or found[name].file.name != file_name:
            raise _damaged(folder / file_name, f"{name} should be in it, says the index")
    return list(found.values())


def checkpoint_manifest(folder: Path, ranks: int, dtype: str = "") -> Manifest:
    """The weights of a checkpoint, to be read by `ranks` ranks.

    Args:
        folder: of the checkpoint.
        ranks: how many read it together, rank 0 the first part of it.
        dtype: as `CheckpointSource` has it.

    Raises:
        ConfigError: as `stored_tensors`.
    """
    stored = stored_tensors(folder)
    rows = [(t.spec.rows, t.spec.nbytes // max(t.spec.rows, 1)) for t in stored]
    return Manifest(_as_read(stored, dtype), tuple(balance(rows, ranks)))


def balance(tensors: Sequence[tuple[int, int]], ranks: int) -> list[Shard]:
    """Give each rank the same number of bytes, up to a row, and no gaps between them.

    Args:
        tensors: number of rows, and bytes of a row.
        ranks: how many share them.
    """
    total = sum(rows * row_bytes for rows, row_bytes in tensors)
    shards = []
    rank, begin = 0, 0
    for index, (rows, row_bytes) in enumerate(tensors):
        end = begin + rows * row_bytes
        row = 0
        while rank + 1 < ranks and total * (rank + 1) < end * ranks:
            # The boundary falls into this tensor: it goes to the nearest row.
            stop = min(round((total * (rank + 1) / ranks - begin) / row_bytes), rows)
            if stop > row:
                shards.append(Shard(index, rank, row, stop))
            row, rank = max(row, stop), rank + 1
        if row < rows:
            shards.append(Shard(index, rank, row, rows))
        begin = end
    return shards


class CheckpointSource:
    """Reads rows of a checkpoint's tensors; `tensors` are those of `checkpoint_manifest`, in the same order.

    Args:
        folder: of the checkpoint.
        dtype: what floating tensors become while they are read; empty: they stay as they are.

    Raises:
        ConfigError: as `stored_tensors`.
    """

    def __init__(self, folder: Path, dtype: str = "") -> None:
        self._stored = stored_tensors(folder)
        self.tensors = _as_read(self._stored, dtype)
        self._open = ExitStack()
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.clear()
        self._open.close()

    def write(self, tensor_index: int, start_row: int, stop_row: int, destination: memoryview) -> None:
        """Put rows `start_row` to `stop_row` of a tensor into `destination`, a view of exactly as many bytes.

        Raises:
            ConfigError: the file cannot be read, or has become shorter.
        """
        stored, wanted = self._stored[tensor_index], self.tensors[tensor_index]
        elements = (stop_row - start_row) * math.prod(wanted.shape[1:])
        if len(destination) != elements * ITEM_BYTES[wanted.dtype]:
            raise ValueError(f"{wanted.name}: {len(destination)} bytes for {elements} {wanted.dtype}")
        first = stored.offset + start_row * (stored.spec.nbytes // max(stored.spec.rows, 1))
        if stored.spec.dtype == wanted.dtype:
            self._read(stored.file, first, destination)
        else:
            self._convert(stored, first, wanted.dtype, destination)

    def _read(self, file: Path, offset: int, destination: memoryview) -> None:
        try:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
                self._open.callback(os.close, self._files[file])
            done = 0
            while done < len(destination):  # a call reads 2 GiB at most
                count = os.preadv(self._files[file], [destination[done:]], offset + done)
                if count == 0:
                    raise _damaged(file, f"it ends at byte {offset + done}, within its tensors")
                done += count
        except OSError as error:
            raise ConfigError(f"model {file.parent}: {file.name} cannot be read ({error})") from error

    def _convert(self, stored: StoredTensor, offset: int, dtype: str, destination: memoryview) -> None:
        import torch

        result = torch.frombuffer(destination, dtype=getattr(torch, dtype)) if destination else torch.empty(0)
        item = ITEM_BYTES[stored.spec.dtype]
        scratch = torch.empty(min(len(result), CONVERTED_AT_ONCE), dtype=getattr(torch, stored.spec.dtype))
        raw = scratch.view(torch.uint8).numpy().data
        for start in range(0, len(result), CONVERTED_AT_ONCE):
            piece = result[start : start + CONVERTED_AT_ONCE]
            self._read(stored.file, offset + start * item, raw[: len(piece) * item])
            piece.copy_(scratch[: len(piece)])


def _as_read(stored: Iterable[StoredTensor], dtype: str) -> tuple[TensorSpec, ...]:
    return tuple(
        msgspec.structs.replace(
            tensor.spec, dtype="float32" if tensor.spec.name.endswith(FLOAT32_SUFFIX) else dtype
        )
        if dtype and tensor.spec.dtype in CONVERTIBLE
        else tensor.spec
        for tensor in stored
    )


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, whose bytes must follow each other from the header's end to the file's."""
    try:
        with file.open("rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise _damaged(file, f"{size} bytes cannot hold a header of {length}")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise ConfigError(f"model {file.parent}: {file.name} cannot be read ({error})") from error
    except ValueError as error:
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a table")
    header.pop("__metadata__", None)
    tensors = sorted(
        (_stored(file, 8 + length, name, entry) for name, entry in header.items()), key=lambda t: t.offset
    )
    ends = [8 + length, *(tensor.offset + tensor.spec.nbytes for tensor in tensors)]
    for tensor, end in zip(tensors, ends, strict=False):
        if tensor.offset != end:
            raise _damaged(file, f"{tensor.spec.name} is at byte {tensor.offset}, and not at {end}")
    if ends[-1] != size:
        raise _damaged(file, f"its tensors end at byte {ends[-1]}, and it has {size}")
    return tensors


def _stored(file: Path, base: int, name: str, entry: Any) -> StoredTensor:
    try:
        spec = TensorSpec(name, DTYPES[entry["dtype"]], msgspec.convert(entry["shape"], tuple[int, ...]))
        start, stop = msgspec.convert(entry["data_offsets"], tuple[int, int])
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise _damaged(file, f"its header's entry of {name} is not understood: {error}") from error
    if start < 0 or min(spec.shape, default=0) < 0 or stop - start != spec.nbytes:
        raise _damaged(
            file, f"{name} has {stop - start} bytes, and {spec.dtype}{list(spec.shape)} takes others"
        )
    return StoredTensor(file, base + start, spec)


def _damaged(file: Path, why: str) -> ConfigError:
    return ConfigError(f"model {file.parent}: {file.name} is damaged ({why})")
