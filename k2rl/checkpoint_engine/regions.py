"""Views of tensors, and the boxes that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from k2rl.checkpoint_engine.plan import Box

#: For each dimension of a view: which dimension of the tensor it walks along, and in steps of how many
#: elements of it; None where it stands still.
Steps = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a contiguous tensor: `offset`, `size` and `stride`, as `torch.as_strided` takes them."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These elements of a contiguous tensor."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each dimension of a contiguous tensor."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def whole_box(shape: Sequence[int]) -> Box:
    return tuple((0, length) for length in shape)


@dataclass(frozen=True, slots=True)
class Region:
    """A view of a contiguous tensor and the smallest box that holds all of it.

    `steps` is None where the view does not walk along the tensor's dimensions (it was flattened, say); the
    box is then the whole tensor.
    """

    shape: tuple[int, ...]
    view: View
    box: Box
    steps: Steps | None

    @property
    def fills_box(self) -> bool:
        """Whether every element of the box is in the view, once."""
        whole = math.prod(stop - start for start, stop in self.box)
        return 0 not in self.view.stride and self.view.numel == whole

    @property
    def has_rows(self) -> bool:
        """Whether at most one dimension of the view walks along the tensor's rows; see `rows`."""
        return bool(self.shape) and self.steps is not None and len(self._along_rows()) <= 1

    def _along_rows(self) -> list[tuple[int, int]]:
        """Dimensions of the view that walk along dimension 0, and in steps of how many rows."""
        return [
            (dimension, step[1])
            for dimension, step in enumerate(self.steps or ())
            if step is not None and step[0] == 0
        ]

    def rows(self, start: int, stop: int) -> tuple[int | None, int, int, View] | None:
        """The elements in rows `start` to `stop` of the tensor, in a contiguous tensor of just these rows.

        Returns:
            The dimension of the view that is cut (None: all of it is in one row), from where to where, and
            the view. None if it has no elements there.
        """
        row, view = self.box[0][0], self.view
        offset = view.offset - start * strides_of(self.shape)[0]
        along = self._along_rows()
        if not along:
            return (None, 0, 1, View(offset, view.size, view.stride)) if start <= row < stop else None
        ((dimension, step),) = along
        first = max(-((row - start) // step), 0)
        last = min(-((row - stop) // step), view.size[dimension])
        if first >= last:
            return None
        size = (*view.size[:dimension], last - first, *view.size[dimension + 1 :])
        return dimension, first, last, View(offset + first * view.stride[dimension], size, view.stride)

    def within(self, box: Box) -> View | None:
        """The same elements in a contiguous tensor that holds just `box`; None if some are outside."""
        if box == whole_box(self.shape):
            return self.view
        if self.steps is None:
            return None
        inside = (a <= start and stop <= b for (a, b), (start, stop) in zip(box, self.box, strict=True))
        if not all(inside):
            return None
        strides = strides_of([stop - start for start, stop in box])
        offset = sum(
            (mine[0] - its[0]) * stride for mine, its, stride in zip(self.box, box, strides, strict=True)
        )
        walk = (0 if step is None else step[1] * strides[step[0]] for step in self.steps)
        return View(offset, self.view.size, tuple(walk))


def locate(view: View, shape: Sequence[int]) -> Region:
    """Find the smallest box of a contiguous tensor that holds a view of it (of at least one element)."""
    strides = strides_of(shape)
    rest, start = view.offset, []
    for stride in strides:
        start.append(rest // stride)
        rest %= stride
    extent, steps = [0] * len(shape), []
    for length, stride in zip(view.size, view.stride, strict=True):
        step = None
        if length > 1 and stride > 0:
            step = _step(stride, shape, strides)
            if step is None:
                return Region(tuple(shape), view, whole_box(shape), None)
            extent[step[0]] += (length - 1) * step[1]
        steps.append(step)
    if any(a + more >= length for a, more, length in zip(start, extent, shape, strict=True)):
        return Region(tuple(shape), view, whole_box(shape), None)
    box = tuple((a, a + more + 1) for a, more in zip(start, extent, strict=True))
    return Region(tuple(shape), view, box, tuple(steps))


def _step(stride: int, shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """The outermost dimension along which a stride moves by whole elements."""
    for dim, (length, own) in enumerate(zip(shape, strides, strict=True)):
        if length > 1 and own <= stride and stride % own == 0:
            return dim, stride // own
    return None


class Coverage:
    """Which parts of a tensor have been written; for boxes that are cut along few different lines."""

    def __init__(self, shape: Sequence[int], boxes: Iterable[Box]) -> None:
        cuts: list[set[int]] = [{0, length} for length in shape]
        for box in boxes:
            for known, bounds in zip(cuts, box, strict=True):
                known.update(bounds)
        self._cuts = [{at: number for number, at in enumerate(sorted(known))} for known in cuts]
        self._lengths = [np.diff(sorted(known)) for known in cuts]
        self._written = np.zeros([len(lengths) for lengths in self._lengths], dtype=bool)

    def write(self, box: Box) -> bool:
        """Mark a box as written; whether none of it was before."""
        where = tuple(slice(cut[a], cut[b]) for cut, (a, b) in zip(self._cuts, box, strict=True))
        fresh = not self._written[where].any()
        self._written[where] = True
        return fresh

    @property
    def numel(self) -> int:
        """Number of elements written."""
        count = self._written.astype(np.int64)
        for lengths in reversed(self._lengths):
            count = count @ lengths
        return int(count)
