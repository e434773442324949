"""A plan moves every byte exactly once to each receiver, from a rank that holds it, and nothing overlaps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.manifest import (
    ITEM_BYTES,
    Manifest,
    ManifestError,
    Shard,
    TensorSpec,
    check_same_model,
    merge,
)
from k2rl.checkpoint_engine.plan import (
    ALIGNMENT,
    MOST_CHANGED,
    Block,
    Box,
    Part,
    Plan,
    PlanError,
    fit_bucket,
    largest_unit,
    plan_delta,
    plan_push,
    whole,
)

RECEIVERS = (0, 1, 2)

dtypes = st.sampled_from(["bfloat16", "float32", "int8", "float8_e4m3fn", "int64", "bool"])
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Scalars, empty tensors, units, rows cut anywhere, replicas."""
    kinds = draw(
        st.lists(st.tuples(dtypes, shapes, st.sampled_from(["", "", "u", "v"])), min_size=1, max_size=6)
    )
    specs = tuple(TensorSpec(f"t{i}", *kind) for i, kind in enumerate(kinds))
    shards = []
    for index, spec in enumerate(specs):
        inner = draw(st.lists(st.integers(0, spec.rows), max_size=3))
        for start, stop in itertools.pairwise(sorted({0, spec.rows, *inner})):
            owners = draw(st.sets(st.integers(0, 3), min_size=1, max_size=2))
            shards += [Shard(index, owner, start, stop) for owner in sorted(owners)]
    return Manifest(specs, tuple(draw(st.permutations(shards))))


@st.composite
def pushes(draw: st.DrawFn) -> tuple[Manifest, Plan]:
    manifest = draw(manifests())
    size = largest_unit(manifest).nbytes + draw(st.integers(0, 4)) * ALIGNMENT + draw(st.integers(0, 255))
    return manifest, plan_push(manifest, RECEIVERS, bucket_bytes=size, slots=draw(st.sampled_from([0, 2, 3])))


def elements(spec: TensorSpec, box: Box) -> set[tuple[int, ...]]:
    """Indices of the elements of a box."""
    return set(itertools.product(*(range(start, stop) for start, stop in box)))


def blocks(plan: Plan, receiver: int) -> list[tuple[int, Block]]:
    """Those that a receiver gets, with the numbers of their buckets."""
    return [(b.index, block) for b in plan.buckets if receiver in b.receivers for block in b.blocks]


def check_layout(plan: Plan, manifest: Manifest, bucket_bytes: int) -> None:
    """Whatever the strategy: who writes what where."""
    for number, bucket in enumerate(plan.buckets):
        assert bucket.index == number
        assert bucket.blocks
        assert bucket.nbytes <= bucket_bytes
        assert bucket.offset % ALIGNMENT == 0
        assert bucket.offset + bucket.nbytes <= plan.arena_bytes
        end = 0
        for block in bucket.blocks:
            assert block.offset % ALIGNMENT == 0
            assert block.offset >= end
            end = block.offset + block.nbytes
            spec = manifest.tensors[block.tensor]
            assert block.nbytes == len(elements(spec, block.box)) * ITEM_BYTES[spec.dtype] > 0
            # Its rows, in order, each from a rank that holds it.
            row, last = block.box[0] if block.box else (0, 1)
            place = block.offset
            for part in block.parts:
                assert part.start == row < part.stop
                assert block.place(part)[0] == place
                assert any(
                    s.owner == part.owner and s.start <= part.start and part.stop <= s.stop
                    for s in manifest.shards_of[block.tensor]
                )
                row, place = part.stop, sum(block.place(part))
            assert (row, place) == (last, end)
        assert end <= bucket.nbytes
        assert bucket.owners == tuple(sorted({p.owner for block in bucket.blocks for p in block.parts}))
    check_arena(plan)


def check_arena(plan: Plan) -> None:
    """Buckets share bytes only with those that they come `after`, however indirectly."""
    for bucket in plan.buckets:
        before = set()
        after = bucket.after
        while after >= 0:
            before.add(after)
            after = plan.buckets[after].after
        for other in plan.buckets[: bucket.index]:
            apart = (
                other.offset + other.nbytes <= bucket.offset or bucket.offset + bucket.nbytes <= other.offset
            )
            assert apart or other.index in before
        assert bucket.after < bucket.index
        assert bucket.after < 0 or not plan.retains


@settings(max_examples=40)
@given(pushes())
def test_a_broadcast_brings_every_element_once_to_everybody(push: tuple[Manifest, Plan]) -> None:
    manifest, plan = push
    check_layout(plan, manifest, max((b.nbytes for b in plan.buckets), default=0))
    for receiver in RECEIVERS:
        got = Counter(block.tensor for _, block in blocks(plan, receiver))
        assert set(got.values()) <= {1}
        assert set(got) == {i for i, spec in enumerate(manifest.tensors) if spec.nbytes}
        assert all(block.box == whole(manifest.tensors[block.tensor]) for _, block in blocks(plan, receiver))
    assert plan.nbytes == manifest.nbytes
    buckets = {block.tensor: index for index, block in blocks(plan, 0)}
    for unit in {spec.unit for spec in manifest.tensors} - {""}:
        members = {buckets[i] for i, s in enumerate(manifest.tensors) if s.unit == unit and s.nbytes}
        assert len(members) <= 1, "what belongs together travels together"


@settings(max_examples=40)
@given(manifests(), st.integers(1, 1 << 14), st.sampled_from([0, 2, 3]))
def test_a_bucket_is_never_larger_than_asked_and_the_error_says_what_is_needed(
    manifest: Manifest, bucket_bytes: int, slots: int
) -> None:
    needed = largest_unit(manifest).nbytes
    if bucket_bytes // ALIGNMENT * ALIGNMENT < needed:
        with pytest.raises(PlanError, match=r"needs a bucket of [\d,]+ bytes"):
            plan_push(manifest, RECEIVERS, bucket_bytes=bucket_bytes, slots=slots)
    else:
        plan = plan_push(manifest, RECEIVERS, bucket_bytes=bucket_bytes, slots=slots)
        assert all(bucket.nbytes <= bucket_bytes for bucket in plan.buckets)
        assert not slots or plan.arena_bytes <= slots * bucket_bytes


@settings(max_examples=40)
@given(manifests(), st.integers(2, 4), st.integers(0, 1 << 14))
def test_a_ring_stays_within_its_memory_or_says_how_much_it_needs(
    manifest: Manifest, slots: int, budget: int
) -> None:
    needed = largest_unit(manifest).nbytes * slots
    if budget < needed:
        with pytest.raises(PlanError, match=f"need {needed:,}$"):
            fit_bucket(manifest, budget, slots)
    for enough in {needed, max(budget, needed)}:
        plan = plan_push(manifest, RECEIVERS, bucket_bytes=fit_bucket(manifest, enough, slots), slots=slots)
        assert plan.arena_bytes <= enough


@settings(max_examples=40)
@given(pushes(), pushes())
def test_plans_are_equal_exactly_when_their_digests_are(
    one: tuple[Manifest, Plan], other: tuple[Manifest, Plan]
) -> None:
    assert (one[1] == other[1]) == (one[1].digest == other[1].digest)
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(one[1]), type=Plan)
    assert copy == one[1]
    assert copy.digest == one[1].digest


@st.composite
def needs(draw: st.DrawFn, manifest: Manifest) -> dict[int, dict[str, list[Box]]]:
    """Boxes of rows and columns, a tensor in several; everything, or nothing."""
    found: dict[int, dict[str, list[Box]]] = {receiver: {} for receiver in RECEIVERS}
    for receiver, spec in itertools.product(RECEIVERS, manifest.tensors):
        box = []
        for length in spec.shape:
            start = draw(st.integers(0, length))
            box.append(draw(st.sampled_from([(0, length), (start, length), (0, start)])))
        boxes = [tuple(box)]
        if box and draw(st.booleans()):
            (first, last), *columns = box
            boxes = [((row, row + 1), *columns) for row in range(first, last)]
        if draw(st.booleans()):
            found[receiver][spec.name] = boxes
    return found


@settings(max_examples=40)
@given(st.data(), manifests(), st.sampled_from([0, 2, 3]))
def test_a_shard_aware_push_brings_each_receiver_what_it_needs_once(
    data: st.DataObject, manifest: Manifest, slots: int
) -> None:
    wanted: Mapping[int, Mapping[str, list[Box]]] = data.draw(needs(manifest))
    size = largest_unit(manifest, wanted).nbytes
    if size:
        with pytest.raises(PlanError, match="needs a bucket of"):
            plan_push(manifest, RECEIVERS, bucket_bytes=size - 1, slots=slots, needs=wanted)
    plan = plan_push(manifest, RECEIVERS, bucket_bytes=size, slots=slots, needs=wanted)
    check_layout(plan, manifest, size)
    for receiver in RECEIVERS:
        got: Counter[tuple[str, tuple[int, ...]]] = Counter()
        units: dict[str, set[int]] = {}
        for index, block in blocks(plan, receiver):
            spec = manifest.tensors[block.tensor]
            got.update((spec.name, element) for element in elements(spec, block.box))
            if spec.unit and sum(other.unit == spec.unit for other in manifest.tensors) > 1:
                units.setdefault(spec.unit, set()).add(index)
        specs = {spec.name: spec for spec in manifest.tensors}
        expected = {
            (name, element)
            for name, boxes in wanted[receiver].items()
            for box in boxes
            for element in elements(specs[name], box)
        }
        assert set(got) == expected
        assert set(got.values()) <= {1}
        assert all(len(buckets) == 1 for buckets in units.values()), "units are never split"


@settings(max_examples=40, deadline=None)
@given(st.data(), manifests(), st.sampled_from([0, 2]))
def test_a_delta_brings_what_has_changed_and_in_an_arena_each_row_to_its_place(
    data: st.DataObject, manifest: Manifest, slots: int
) -> None:
    names = [spec.name for spec in manifest.tensors]
    changed = {
        spec.name: data.draw(st.lists(st.tuples(st.integers(0, spec.rows), st.integers(0, spec.rows))))
        for spec in manifest.tensors
        if data.draw(st.booleans())
    }
    together = data.draw(st.lists(st.sets(st.sampled_from(names), min_size=1), max_size=2))
    size = largest_unit(manifest).nbytes
    full = plan_push(manifest, RECEIVERS, bucket_bytes=size, slots=slots)
    plan = plan_delta(manifest, full, changed, 4, together)
    wanted = {
        (spec.name, row)
        for spec in manifest.tensors
        for start, stop in changed.get(spec.name, ())
        for row in range(start, stop)
        if spec.nbytes
    }
    if plan.strategy == "broadcast":
        assert plan == full
        assert wanted
        return
    assert (plan.strategy, plan.base) == ("delta", 4)
    assert plan.nbytes <= MOST_CHANGED * manifest.nbytes
    places = _places(full)
    got = _places(plan)
    assert wanted <= got.keys()
    assert plan.nbytes == sum(nbytes for _, nbytes, _ in got.values()), "no row twice"
    touched = {name for name, _ in got}
    for group in together:
        if touched & group:
            assert {place for place in places if place[0] in group} <= got.keys()
    if not wanted:
        assert not plan.buckets
    if slots:
        check_layout(plan, manifest, size)
    else:
        assert plan.arena_bytes == full.arena_bytes
        assert got.items() <= places.items()
        assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))


def _places(plan: Plan) -> dict[tuple[str, int], tuple[int, int, int]]:
    """By tensor and row: first byte in the arena, number of bytes, and the owner."""
    return {
        (plan.tensors[block.tensor].name, row): (
            bucket.offset + block.place(Part(0, row, row + 1))[0],
            block.place(Part(0, row, row + 1))[1],
            part.owner,
        )
        for bucket in plan.buckets
        for block in bucket.blocks
        for part in block.parts
        for row in range(part.start, part.stop)
    }


def test_a_delta_is_of_tensors_that_are_sent_to_everyone() -> None:
    manifest = Manifest.whole([TensorSpec("a", "int8", (4, 2))])
    full = plan_push(manifest, [0], bucket_bytes=256)
    with pytest.raises(PlanError, match="b changed, which nobody sends"):
        plan_delta(manifest, full, {"b": [(0, 1)]}, 1)
    needs = {0: {"a": [((0, 4), (0, 1))]}}
    with pytest.raises(PlanError, match="not as shard_aware"):
        plan_delta(manifest, plan_push(manifest, [0], bucket_bytes=256, needs=needs), {}, 1)


def test_needs_that_no_tensor_meets_are_an_error() -> None:
    manifest = Manifest.whole([TensorSpec("a", "int8", (4, 2))])
    for name, box in (("b", ((0, 4), (0, 2))), ("a", ((0, 5), (0, 2))), ("a", ((0, 4),))):
        with pytest.raises(PlanError, match=f"receiver 3 needs {name}"):
            plan_push(manifest, [3], bucket_bytes=256, needs={3: {name: [box]}})


def test_replicas_share_the_work() -> None:
    """Of several owners of the same rows, the one with the least to do so far writes them."""
    specs = tuple(TensorSpec(f"t{i}", "float32", (4, 100 if i else 300)) for i in range(4))
    shards = tuple(Shard(i, owner, 0, 4) for i in range(4) for owner in range(2))
    plan = plan_push(Manifest(specs, shards), [0], bucket_bytes=1 << 14)
    (bucket,) = plan.buckets
    assert [block.parts[0].owner for block in bucket.blocks] == [0, 1, 1, 1]


def test_one_slot_is_refused() -> None:
    with pytest.raises(PlanError, match="at least 2"):
        plan_push(Manifest.whole([TensorSpec("a", "int8", (4,))]), [0], bucket_bytes=256, slots=1)


def test_an_incomplete_manifest_lists_what_is_wrong() -> None:
    specs = (
        TensorSpec("hole", "int8", (6,)),
        TensorSpec("none", "int8", ()),
        TensorSpec("odd", "complex7", (1,)),
        TensorSpec("long", "int8", (3,)),
        TensorSpec("long", "int8", (3,)),
    )
    shards = (Shard(0, 0, 0, 2), Shard(0, 1, 3, 6), Shard(2, 0, 0, 1), Shard(3, 0, 0, 5), Shard(4, 0, 0, 3))
    with pytest.raises(ManifestError) as caught:
        Manifest(specs, shards).check()
    message = str(caught.value)
    for problem in (
        "hole: row 2 of 6 has no owner",
        "none: row 0 of 1 has no owner",
        "unknown dtype complex7",
        "long appears twice",
        "long: trainer rank 0 holds rows 0 to 5 of 3",
    ):
        assert problem in message


def test_ranks_that_disagree_are_told_about_what() -> None:
    one = Manifest.whole([TensorSpec("a", "int8", (4,)), TensorSpec("b", "int8", (2,))])
    other = Manifest.whole([TensorSpec("a", "int8", (5,)), TensorSpec("b", "int8", (2,))], owner=1)
    with pytest.raises(ManifestError, match=r"disagree about 1 tensors: a: int8\[4\] and int8\[5\]"):
        merge([one, other])


@settings(max_examples=40)
@given(manifests(), st.randoms(use_true_random=False))
def test_what_each_rank_says_it_holds_merges_into_the_whole(manifest: Manifest, random: object) -> None:
    """However the ranks number the tensors that they name."""
    parts = []
    for owner in manifest.owners:
        held = [s for s in manifest.shards if s.owner == owner]
        order = sorted({s.tensor for s in held})
        random.shuffle(order)  # type: ignore[attr-defined]
        parts.append(
            Manifest(
                tuple(manifest.tensors[i] for i in order),
                tuple(Shard(order.index(s.tensor), owner, s.start, s.stop) for s in held),
            )
        )
    merged = merge(parts)

    def held(whole: Manifest) -> set[tuple[str, int, int, int]]:
        return {(whole.tensors[s.tensor].name, s.owner, s.start, s.stop) for s in whole.shards}

    assert held(merged) == held(manifest)
    assert merged.nbytes == manifest.nbytes


def test_weights_of_another_model_are_listed() -> None:
    sent = [TensorSpec("a", "int8", (4,)), TensorSpec("b", "int8", (2,)), TensorSpec("x", "int8", (1,))]
    expected = {"a": ("int8", (4,)), "b": ("float32", (3,)), "c": ("int8", (1,))}
    with pytest.raises(ManifestError) as caught:
        check_same_model(sent, expected)
    message = str(caught.value)
    assert "3 places" in message
    for problem in ("missing: c", "extra: x", "b: sent int8[2], the model takes float32[3]"):
        assert problem in message
    with pytest.raises(ManifestError, match="and 10 more"):
        check_same_model([], {f"t{i}": ("int8", (1,)) for i in range(30)})
