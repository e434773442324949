"""Watch a loader put tensors into parameters, and write down which elements it copied where."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from k2rl.checkpoint_engine.plan import Box
from k2rl.checkpoint_engine.regions import Coverage, Region, View, locate

#: A module and the name of one of its parameters or buffers.
Key = tuple[torch.nn.Module, str]


@dataclass(slots=True)
class Copy:
    """Elements of the tensor `name`, copied into a parameter."""

    name: str
    source: Region
    target: Region

    @property
    def has_rows(self) -> bool:
        """Whether single rows of the tensor can be copied."""
        return self.source.has_rows and self.source.view.size == self.target.view.size


@dataclass(slots=True)
class Fill:
    """Padding: elements of a parameter, set to a number."""

    value: float
    target: Region


@dataclass(slots=True)
class Writes:
    """Everything that was done to one parameter; `impure` says what of it was no copy, "" if nothing."""

    shape: tuple[int, ...]
    #: Elements that are to be written, padding left out.
    numel: int
    copies: dict[View, Copy] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    #: Names of the tensors that were used, as far as known.
    names: set[str] = field(default_factory=set)
    impure: str = ""
    touched: bool = False

    def missing(self) -> int:
        """Elements that nothing reached."""
        regions = [*(fill.target for fill in self.fills), *(copy.target for copy in self.copies.values())]
        coverage = Coverage(self.shape, (region.box for region in regions))
        for region in regions:
            coverage.write(region.box)
        return max(self.numel - coverage.numel, 0)

    def spoil(self, why: str) -> None:
        """It was written in a way that is no copy."""
        self.impure = self.impure or why


@dataclass(frozen=True, slots=True)
class _Source:
    name: str
    tensor: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Derived:
    """A copy that a loader made for itself; held so that its memory is not used again meanwhile."""

    tensor: torch.Tensor
    name: str
    source: View
    shape: tuple[int, ...]


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_ZERO, _FILL = torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar


class CopyRecorder(TorchDispatchMode):
    """While it is active, notes for every watched parameter what was written into it, and from where.

    Anything that is not a copy of elements of a source, or a fill with a number, makes the parameter impure.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.writes: dict[Key, Writes] = {}
        self._targets: dict[int, tuple[Key, torch.Tensor]] = {}
        self._sources: list[_Source] = []
        self._tensors: dict[str, torch.Tensor] = {}
        self._current: _Source | None = None
        self._derived: dict[int, _Derived] = {}
        #: Tensors of the update that the loader changed in place.
        self.changed: set[str] = set()

    def watch(self, key: Key, tensor: torch.Tensor) -> None:
        """Note what is written into `tensor` (it may be on the meta device)."""
        if is_lazy(tensor):
            return
        numel = getattr(tensor, "weight_loader_numel", tensor.numel())
        self.writes[key] = Writes(tuple(tensor.shape), numel)
        self._targets[tensor.untyped_storage()._cdata] = (key, tensor.detach())
        if not tensor.is_contiguous():
            self.writes[key].spoil("not contiguous")

    def sources(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass on the tensors that are to be loaded. They are held, and must not change, until `release`."""
        for name, tensor in tensors:
            dense = tensor.detach().contiguous()
            start = dense.data_ptr()
            self._current = _Source(name, dense, start, start + dense.nbytes)
            bisect.insort(self._sources, self._current, key=lambda source: source.start)
            self.shapes[name] = tuple(dense.shape)
            self._tensors[name] = dense
            yield name, dense
        self._current = None
        self._derived.clear()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the update."""
        return self._tensors[name]

    def release(self) -> None:
        """Let go of all tensors."""
        self._sources, self._current = [], None
        self._tensors.clear()
        self._derived.clear()
        self._targets.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            self._copied(args[0], args[1])
        elif func is _ZERO or func is _FILL:
            self._filled(args[0], 0.0 if func is _ZERO else float(args[1]))
        elif func in _COPIES:
            self._derive(args[0], result)
        elif func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[position] if position < len(args) else kwargs.get(argument.name)
                    self._spoil(value, f"written by {func}")
        return result

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if _is_same(target, source):
            return
        found = self._target(target)
        if found is None:
            return
        writes, region = found
        origin = self._origin(source.expand(target.shape))
        if origin is None:
            writes.spoil("written from something that is not a tensor of the update")
            return
        name, view = origin
        writes.names.add(name)
        if not region.fills_box:
            writes.spoil("written in places that are no box")
            return
        copy = Copy(name, locate(view, self.shapes[name]), region)
        known = writes.copies.get(region.view)
        if known is not None and known != copy:
            writes.spoil("written twice")
        writes.copies[region.view] = copy

    def _filled(self, target: torch.Tensor, value: float) -> None:
        found = self._target(target)
        if found is None:
            return
        writes, region = found
        if not region.fills_box or math.isnan(value):
            writes.spoil("filled in places that are no box")
        elif any(_overlap(region.box, copy.target.box) for copy in writes.copies.values()):
            writes.spoil("filled after it was written")
        else:
            writes.fills.append(Fill(value, region))

    def _derive(self, source: torch.Tensor, result: torch.Tensor) -> None:
        origin = self._origin(source) if source.dtype == result.dtype else None
        if origin is not None and result.is_contiguous():
            name, view = origin
            key = result.untyped_storage()._cdata
            self._derived[key] = _Derived(result, name, view, tuple(result.shape))

    def _spoil(self, tensor: Any, why: str) -> None:
        for value in tensor if isinstance(tensor, list | tuple) else [tensor]:
            found = self._target(value) if isinstance(value, torch.Tensor) else None
            if found is not None:
                found[0].spoil(why)

    def _target(self, tensor: torch.Tensor) -> tuple[Writes, Region] | None:
        """What is about to be overwritten, if it is watched."""
        if tensor.numel() == 0:
            return None
        found = self._targets.get(tensor.untyped_storage()._cdata)
        if found is None:
            self._derived.pop(tensor.untyped_storage()._cdata, None)
            source = None if tensor.is_meta else self._source_at(tensor.data_ptr())
            if source is not None:
                self.changed.add(source.name)
            return None
        key, base = found
        writes = self.writes[key]
        writes.touched = True
        if self._current is not None:
            writes.names.add(self._current.name)
        if base.dtype != tensor.dtype:
            writes.spoil("written as another dtype")
        view = View(_offset(tensor, base), tuple(tensor.shape), tensor.stride())
        return writes, locate(view, writes.shape)

    def _origin(self, tensor: torch.Tensor) -> tuple[str, View] | None:
        """Which elements of which source these are."""
        if tensor.is_meta or tensor.numel() == 0:
            return None
        derived = self._derived.get(tensor.untyped_storage()._cdata)
        if derived is not None:
            return self._through(derived, tensor)
        source = self._source_at(tensor.data_ptr())
        if source is None or source.tensor.dtype != tensor.dtype:
            return None
        offset = (tensor.data_ptr() - source.start) // tensor.itemsize
        return source.name, View(offset, tuple(tensor.shape), tensor.stride())

    def _through(self, derived: _Derived, tensor: torch.Tensor) -> tuple[str, View] | None:
        """A view of a loader's own copy, as a view of what that is a copy of."""
        base = derived.tensor
        view = View(_offset(tensor, base), tuple(tensor.shape), tensor.stride())
        region = locate(view, derived.shape)
        if region.steps is None or base.dtype != tensor.dtype:
            return None
        strides = derived.source.stride
        offset = sum(start * stride for (start, _), stride in zip(region.box, strides, strict=True))
        walk = (0 if step is None else step[1] * strides[step[0]] for step in region.steps)
        return derived.name, View(derived.source.offset + offset, view.size, tuple(walk))

    def _source_at(self, address: int) -> _Source | None:
        # First the tensor in turn: two names may lie at the same place.
        if self._current is not None and self._current.start <= address < self._current.stop:
            return self._current
        index = bisect.bisect_right(self._sources, address, key=lambda source: source.start) - 1
        if index >= 0 and address < self._sources[index].stop:
            return self._sources[index]
        return None


def _overlap(one: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


def _offset(view: torch.Tensor, base: torch.Tensor) -> int:
    return int(view.storage_offset()) - int(base.storage_offset())


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a copy from one to the other changes nothing."""
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata or one.dtype != other.dtype:
        return False
    return (one.storage_offset(), one.shape, one.stride()) == (
        other.storage_offset(),
        other.shape,
        other.stride(),
    )
