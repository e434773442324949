"""Shared memory that the trainer writes its weights into and inference workers on the host map.

The arena is an anonymous memory file: it has no name to collide on or leak, and the kernel frees it
when the last process that maps it is gone, however that process ended.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

import torch
import xxhash

from k2rl.checkpoint_engine.manifest import Manifest, TensorRecord, WeightTransferError

ALIGNMENT = 256


class WeightArena:
    """The sender's side: allocated at the first push, reused by every later one."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._buffer: mmap.mmap | None = None

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> Manifest:
        """Copy tensors (any device) into the arena, hashing each.

        The set of names, dtypes and shapes may change between pushes; the arena grows when it must.
        """
        tensors = list(named_tensors)
        offsets, size = [], 0
        for _, tensor in tensors:
            offsets.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = self._reserve(size)
        whole = torch.frombuffer(buffer, dtype=torch.uint8)
        records = []
        for (name, tensor), offset in zip(tensors, offsets, strict=True):
            nbytes = tensor.nbytes
            target = whole[offset : offset + nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor.detach())
            digest = xxhash.xxh3_128_hexdigest(memoryview(buffer)[offset : offset + nbytes])
            dtype = str(tensor.dtype).removeprefix("torch.")
            records.append(TensorRecord(name, dtype, tuple(tensor.shape), offset, nbytes, digest))
        return Manifest(version, f"/proc/{os.getpid()}/fd/{self._fd}", size, tuple(records))

    def _reserve(self, size: int) -> mmap.mmap:
        if self._buffer is not None and len(self._buffer) >= size:
            return self._buffer
        self.close()
        self._fd = os.memfd_create("k2rl-weights")
        os.ftruncate(self._fd, size)
        self._buffer = mmap.mmap(self._fd, size)
        return self._buffer

    def close(self) -> None:
        """Let go of the memory; receivers that still map it keep their view."""
        if self._fd is not None:
            os.close(self._fd)
        # The mapping itself goes with its last tensor view; closing it under a view would raise.
        self._fd, self._buffer = None, None


def read_arena(manifest: Manifest) -> list[tuple[str, torch.Tensor]]:
    """The receiver's side: map the arena and check every tensor against its digest.

    Returns views into shared memory; copy what must outlive the push.

    Raises:
        WeightTransferError: the arena is gone or too small, or a tensor's bytes differ from what was sent.
    """
    try:
        fd = os.open(manifest.path, os.O_RDWR)
    except OSError as error:
        raise WeightTransferError(f"cannot map the weights of version {manifest.version}: {error}") from error
    try:
        if os.fstat(fd).st_size < manifest.nbytes:
            raise WeightTransferError(
                f"the arena holds {os.fstat(fd).st_size} bytes, "
                f"version {manifest.version} needs {manifest.nbytes}"
            )
        # Private and writable: torch wants writable memory, the sender's bytes must stay the sender's.
        buffer = mmap.mmap(fd, manifest.nbytes, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(fd)
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    tensors = []
    for record in manifest.records:
        end = record.offset + record.nbytes
        if xxhash.xxh3_128_hexdigest(memoryview(buffer)[record.offset : end]) != record.digest:
            raise WeightTransferError(f"version {manifest.version}: {record.name} arrived corrupted")
        dtype = getattr(torch, record.dtype)
        tensors.append((record.name, whole[record.offset : end].view(dtype).view(record.shape)))
    return tensors
