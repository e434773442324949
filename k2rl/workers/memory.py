"""Host memory that engines give back to the system while the other one works."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

if TYPE_CHECKING:
    from torch import Tensor

from k2rl.errors import RunError

Engine = Literal["trainer", "vllm"]
Kind = Literal["parameters", "optimizer", "gradients", "weights", "kv_cache"]

GIB = 1 << 30

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


class Holding(msgspec.Struct, frozen=True):
    """Memory of one kind that an engine has."""

    nbytes: int
    device: str
    #: Whether the engine must have given it up before the other one works.
    takes_turns: bool


class MemoryLedger:
    """Who holds how many bytes, as the engines' owner directs them, and whose turn it is."""

    def __init__(self) -> None:
        self.turn: Engine | None = None
        self._held: dict[tuple[Engine, Kind], Holding] = {}

    def hold(
        self, engine: Engine, kind: Kind, nbytes: int, device: str = "cpu", takes_turns: bool = True
    ) -> None:
        """`engine` has `nbytes` of this kind from now on, instead of what it had.

        Raises:
            RunError: it is the other engine's turn, and this is memory that takes turns.
        """
        if takes_turns and nbytes and self.turn not in (None, engine):
            raise RunError(
                f"{engine} takes {nbytes / GIB:.2f} GiB of {device} memory for its {kind} while it is "
                f"the turn of {self.turn}"
            )
        self._held[engine, kind] = Holding(nbytes, device, takes_turns)

    def give_up(self, engine: Engine) -> None:
        """`engine` has given back all that takes turns."""
        self._held = {
            key: holding for key, holding in self._held.items() if key[0] != engine or not holding.takes_turns
        }

    def begin(self, engine: Engine) -> None:
        """It is the turn of `engine`.

        Raises:
            RunError: the other one still holds memory that takes turns.
        """
        for (holder, kind), holding in self._held.items():
            if holder != engine and holding.takes_turns and holding.nbytes:
                raise RunError(
                    f"it is the turn of {engine}, but {holder} still holds {holding.nbytes / GIB:.2f} GiB "
                    f"of {holding.device} memory for its {kind}"
                )
        self.turn = engine

    def held(self, engine: Engine) -> int:
        """Bytes that `engine` has."""
        return sum(holding.nbytes for (holder, _), holding in self._held.items() if holder == engine)

    def gib(self) -> dict[str, float]:
        """GiB of each kind, as `<engine>_<kind>_gib`."""
        return {
            f"{engine}_{kind}_gib": holding.nbytes / GIB for (engine, kind), holding in self._held.items()
        }
