"""Where a trainer's state lives, so that its memory can be given back while nothing trains.

On a CPU: state in a mapped file is the kernel's to write out and to take back. The process gives it up at the
cost of its page tables, and its pages are memory again as soon as they are touched. On a GPU: copies in the
host's memory, which can be read while the state is there.
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

from k2rl.errors import ConfigError, RunError
from k2rl.workers.memory import advise

_MADV_POPULATE_WRITE = 23
_ALIGNMENT = 64  # what torch's own allocator gives


class Residence:
    """State that stays where it is; the others' interface."""

    #: Whether nobody can compute with the state.
    away = False

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Take care of these tensors and no others any more; they stay the same objects.

        Raises:
            RunError: there is no room for them.
        """

    def offload(self) -> None:
        """Give the memory of the state back."""

    def reload(self) -> None:
        """Take it again; nothing may compute with the state before."""

    def need(self) -> None:
        """As `reload`, if something is about to compute with the state that could not else."""

    def readable(self, tensor: Tensor) -> Tensor:
        """The tensor, or what has its values while its own memory is gone."""
        return tensor


def residence(level: str, folder: Path | None) -> Residence:
    """What `train.offload` names.

    Raises:
        ConfigError: if there is none of that name, or it needs a folder.
    """
    if level == "file" and folder is not None:
        return StateFiles(folder)
    if level not in ("none", "host"):
        raise ConfigError(f"offload={level!r} is not one of none, host, file, or lacks a folder")
    return HostCopies() if level == "host" else Residence()


class HostCopies(Residence):
    """Keeps the state of a device in the host's memory, pinned where a GPU copies to it, between phases.

    The tensors keep their storages, which are empty meanwhile. So views of them stay views, FSDP2's included.
    """

    def __init__(self) -> None:
        self._copies: dict[int, _HostCopy] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        copies = {}
        for tensor in tensors:
            if not tensor.untyped_storage().resizable():  # a mapped file's
                tensor.data = tensor.detach().clone()
            storage = tensor.untyped_storage()
            copies[storage._cdata] = self._copies.get(storage._cdata) or _HostCopy(storage)
        self._copies = copies

    def offload(self) -> None:
        if not self.away:
            self.away = True
            for copy in self._copies.values():
                copy.save()
            self._finish()
            for copy in self._copies.values():
                copy.storage.resize_(0)

    def reload(self) -> None:
        if self.away:
            for copy in self._copies.values():
                copy.restore()
            self._finish()
            self.away = False

    need = reload

    def readable(self, tensor: Tensor) -> Tensor:
        copy = self._copies.get(tensor.untyped_storage()._cdata) if self.away else None
        if copy is None:
            return tensor
        flat = copy.host[: copy.nbytes // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _finish(self) -> None:
        if any(copy.storage.device.type == "cuda" for copy in self._copies.values()):
            torch.cuda.synchronize()


class _HostCopy:
    """A storage, and room for its bytes on the host."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.nbytes = storage.nbytes()
        pinned = storage.device.type == "cuda"
        self.host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)

    def save(self) -> None:
        self.host.copy_(self._bytes(), non_blocking=True)

    def restore(self) -> None:
        self.storage.resize_(self.nbytes)
        self._bytes().copy_(self.host, non_blocking=True)

    def _bytes(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


class StateFiles(Residence):
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
