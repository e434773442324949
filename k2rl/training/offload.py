"""Where a trainer's state lives, so that its memory can be given back while nothing trains.

State in a mapped file is the kernel's to write out and to take back: the process gives it up at the cost
of its page tables, and its pages are memory again as soon as they are touched.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from k2rl.errors import RunError
from k2rl.workers.memory import advise

_MADV_POPULATE_WRITE = 23
_ALIGNMENT = 64  # what torch's own allocator gives


class StateFiles:
    """Keeps tensors in files without a name: nothing of them remains, however the process ends.

    Bytes and addresses stay what they are from `adopt` on, so results do, too. A file goes when the last
    of its tensors does.
    """

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: on the disk that takes the state; one in memory (tmpfs) would free none.
        """
        self._folder = folder
        self._maps: list[tuple[int, int, weakref.ref[mmap.mmap]]] = []

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Move those tensors into a file that are in none yet; they stay the same objects.

        Those of less than a page, not contiguous or on other devices are left where they are.

        Raises:
            RunError: the disk has no room for them.
        """
        held = self._held()
        taken = [
            tensor
            for tensor in tensors
            if tensor.device.type == "cpu"
            and tensor.nbytes >= mmap.PAGESIZE
            and tensor.is_contiguous()
            and not any(start <= tensor.data_ptr() < start + nbytes for start, nbytes in held)
        ]
        if not taken:
            return
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in taken]
        memory = self._new_file(sum(sizes))
        for tensor, end, size in zip(taken, accumulate(sizes), sizes, strict=True):
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
            tensor.data = flat.view(tensor.shape).copy_(tensor.detach())

    def _new_file(self, nbytes: int) -> mmap.mmap:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            try:
                # A hole in it would kill the process once the disk is full.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError as error:
                raise RunError(
                    f"train.offload=file: no room for {nbytes / 2**30:.2f} GiB in {self._folder} "
                    f"({os.strerror(error.errno or 0)}); free some, or set train.offload=none"
                ) from error
            memory = mmap.mmap(file.fileno(), nbytes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._maps.append((start, nbytes, weakref.ref(memory)))
        return memory

    def _held(self) -> list[tuple[int, int]]:
        self._maps = [(start, nbytes, memory) for start, nbytes, memory in self._maps if memory() is not None]
        return [(start, nbytes) for start, nbytes, _ in self._maps]

    @property
    def nbytes(self) -> int:
        """Bytes in files."""
        return sum(nbytes for _, nbytes in self._held())

    def offload(self) -> None:
        """Give the memory back; reading or writing a tensor takes its pages again."""
        for start, nbytes in self._held():
            advise(start, nbytes, mmap.MADV_DONTNEED)

    def reload(self) -> None:
        """Take all of the memory again at once, which is faster than page by page."""
        for start, nbytes in self._held():
            try:
                advise(start, nbytes, _MADV_POPULATE_WRITE)
            except OSError as error:
                if error.errno != errno.EINVAL:  # before Linux 5.14: page by page
                    raise
