from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2rl.checkpoint_engine.copies import CopyRecorder, Writes
from k2rl.checkpoint_engine.regions import Coverage, View, locate, strides_of, whole_box

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


def _numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor whose elements are their own numbers, and a view of it as a loader would take one."""
    tensor = _numbered(draw(shapes))
    view = tensor
    for _ in range(draw(st.integers(0, 4))):
        if view.ndim == 0:
            break
        dim = draw(st.integers(0, view.ndim - 1))
        length = view.shape[dim]
        match draw(st.sampled_from(["narrow", "select", "transpose", "split", "step", "flatten"])):
            case "narrow":
                start = draw(st.integers(0, length - 1))
                view = view.narrow(dim, start, draw(st.integers(1, length - start)))
            case "select":
                view = view.select(dim, draw(st.integers(0, length - 1)))
            case "transpose":
                view = view.transpose(dim, draw(st.integers(0, view.ndim - 1)))
            case "split" if length % 2 == 0:
                view = view.unflatten(dim, (2, length // 2))
            case "step":
                view = view[(*[slice(None)] * dim, slice(None, None, 2))]
            case "flatten" if view.is_contiguous():
                view = view.flatten()
    return tensor, view


def _view(tensor: torch.Tensor) -> View:
    return View(tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


@given(views())
def test_a_view_is_found_again_in_its_box_and_in_the_whole(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    tensor, view = case
    region = locate(_view(view), tensor.shape)
    piece = tensor[tuple(slice(*ends) for ends in region.box)].contiguous()
    inside, outside = region.within(region.box), region.within(whole_box(tensor.shape))
    assert inside is not None
    assert outside is not None
    assert torch.equal(inside.of(piece), view)
    assert torch.equal(outside.of(tensor), view)
    if region.fills_box:
        assert sorted(piece.flatten().tolist()) == sorted(view.flatten().tolist())


@given(views(), st.integers(0, 6), st.integers(1, 6))
def test_of_the_rows_of_a_tensor_a_view_takes_those_that_are_its(
    case: tuple[torch.Tensor, torch.Tensor], start: int, count: int
) -> None:
    """Placed from these rows alone, a target gets them and keeps the rest."""
    tensor, view = case
    region = locate(_view(view), tensor.shape)
    if not region.has_rows:
        return
    stop = min(start + count, len(tensor))
    piece = tensor[start:stop].clone()
    target = torch.full(view.shape, -1)
    expected = torch.where(torch.isin(view, piece), view, target)
    found = region.rows(start, stop) if start < stop else None
    if found is not None:
        dimension, first, last, cut = found
        place = target if dimension is None else target.narrow(dimension, first, last - first)
        place.copy_(cut.of(piece))
    assert torch.equal(target, expected)


@given(views(), st.data())
def test_a_larger_piece_holds_the_view_and_a_smaller_one_does_not(
    case: tuple[torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    tensor, view = case
    region = locate(_view(view), tensor.shape)
    box = tuple((data.draw(st.integers(0, length - 1).map(lambda a: a)), length) for length in tensor.shape)
    found = region.within(box)
    holds = all(a <= start for (a, _), (start, _) in zip(box, region.box, strict=True))
    assert (found is not None) == (holds and (region.steps is not None or box == whole_box(tensor.shape)))
    if found is not None:
        assert torch.equal(found.of(tensor[tuple(slice(*ends) for ends in box)].contiguous()), view)


@given(shapes, st.data())
def test_coverage_counts_as_a_mask_does(shape: tuple[int, ...], data: st.DataObject) -> None:
    ends = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted).map(tuple) for n in shape]
    boxes = data.draw(st.lists(st.tuples(*ends), max_size=5))
    coverage, mask = Coverage(shape, boxes), np.zeros(shape, dtype=bool)
    for box in boxes:
        where = tuple(slice(a, b) for a, b in box)
        coverage.write(box)
        mask[where] = True
        assert coverage.numel == mask.sum()


@given(shapes)
def test_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert strides_of(shape) == torch.empty(shape).stride()


def _record(
    load: Callable[[torch.Tensor, torch.Tensor], None],
    shape: tuple[int, ...],
    target: tuple[int, ...],
    device: str = "meta",
) -> tuple[Writes, torch.Tensor, CopyRecorder]:
    """What was written down of a loader that gets a tensor of `shape` for a parameter of `target`."""
    recorder, module = CopyRecorder(), torch.nn.Identity()
    parameter = torch.zeros(target, device=device)
    source = torch.rand(shape)
    recorder.watch((module, "weight"), parameter)
    with recorder:
        for _, tensor in recorder.sources([("tensor", source)]):
            load(parameter, tensor)
    return recorder.writes[module, "weight"], source, recorder


def _replayed(writes: Writes, source: torch.Tensor) -> torch.Tensor:
    target = torch.zeros(writes.shape)
    for fill in writes.fills:
        fill.target.view.of(target).fill_(fill.value)
    for copy in writes.copies.values():
        copy.target.view.of(target).copy_(copy.source.view.of(source))
    return target


PURE: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], None], tuple[int, ...], tuple[int, ...]]] = {
    "whole": (lambda p, t: p.data.copy_(t), (4, 3), (4, 3)),
    "a rank's columns": (lambda p, t: p.copy_(t.narrow(1, 2, 2)), (4, 6), (4, 2)),
    "transposed": (lambda p, t: p.copy_(t.t()), (4, 3), (3, 4)),
    "two halves of one": (
        lambda p, t: [p[half].copy_(part) for half, part in zip((1, 0), t.chunk(2), strict=True)],
        (4, 3),
        (2, 2, 3),
    ),
    "by assignment": (lambda p, t: p.__setitem__(1, t[2:4]), (4, 3), (2, 2, 3)),
    "through a copy": (lambda p, t: p[:2].copy_(t.t().contiguous()[1:].t()[:2]), (4, 3), (4, 2)),
    "scalar": (lambda p, t: p.copy_(t), (), (1,)),
    "padded": (lambda p, t: (p[:4].copy_(t), p[4:].fill_(0)), (4, 3), (6, 3)),
    "filled before": (lambda p, t: (p.fill_(1), p[:4].copy_(t)), (4, 3), (6, 3)),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", PURE)
def test_copies_are_replayed_as_the_loader_made_them(name: str, device: str) -> None:
    load, shape, target = PURE[name]
    writes, source, recorder = _record(load, shape, target, device)
    assert writes.impure == ""
    assert not recorder.changed
    parameter = torch.zeros(target)
    load(parameter, source)
    assert torch.equal(_replayed(writes, source), parameter)


@pytest.mark.parametrize(
    "load",
    [
        lambda p, t: p.copy_(-t.exp()),
        lambda p, t: (p.copy_(t), p.copy_(p + 1)),
        lambda p, t: (p.copy_(t), p.mul_(2)),
        lambda p, t: p.copy_(t.half().float()),
        lambda p, t: (p.copy_(t), p.fill_(0)),
        lambda p, t: (p.copy_(t), p.copy_(t.flip(0))),
        lambda p, t: p[:, ::2].copy_(t[:, ::2]),
        lambda p, t: torch.add(t, 1, out=p),
    ],
)
def test_what_is_no_copy_is_not_taken_for_one(load: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    writes, _, _ = _record(load, (4, 4), (4, 4), device="cpu")
    assert writes.impure


def test_a_loader_that_changes_the_tensor_itself_is_noticed() -> None:
    _, _, recorder = _record(lambda p, t: p.copy_(t.add_(1)), (4, 4), (4, 4))
    assert recorder.changed == {"tensor"}


def test_elements_that_nothing_reached_are_counted() -> None:
    writes, _, _ = _record(lambda p, t: p[0, 1].copy_(t), (3,), (2, 2, 3))
    assert writes.missing() == 9
