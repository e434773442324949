"""Host memory that engines give back to the system while the other one works."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import psutil
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def release(tensors: Iterable[Tensor]) -> int:
    """Give back the pages under these tensors' storages; the addresses stay valid, whoever holds them.

    Memory of this process's own reads as zeros afterwards. A mapping that others share keeps its contents:
    this process alone no longer holds them. Tensors on other devices are left as they are.

    Returns:
        Bytes given back: whole pages only.

    Raises:
        OSError: the system refused.
    """
    spans = {
        (storage.data_ptr(), storage.nbytes())
        for storage in (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
        if storage.nbytes()
    }
    released = 0
    for start, nbytes in spans:
        # A page's ends may hold something else.
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            advise(first, length, mmap.MADV_DONTNEED)
            released += length
    return released


def advise(start: int, nbytes: int, advice: int) -> None:
    """`madvise` for whole pages.

    Raises:
        OSError: the system refused.
    """
    if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice):
        raise OSError(ctypes.get_errno(), "madvise")


def trim() -> None:
    """Let the allocator give back what is free."""
    _libc.malloc_trim(0)


def resident(pid: int | None = None) -> int:
    """Bytes of physical memory that a process (default: this one) holds, shared ones included."""
    return int(psutil.Process(pid).memory_info().rss)
