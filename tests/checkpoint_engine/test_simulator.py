"""Pushes on clusters: bytes are those of the plan, times never below the floor, and more is never slower."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec
from k2rl.checkpoint_engine.plan import Plan, plan_delta, plan_push
from k2rl.checkpoint_engine.simulator import simulate
from k2rl.checkpoint_engine.topology import NVLINK_EFFICIENCY, Topology
from k2rl.config import DeviceConfig

CPU = DeviceConfig(per_host=4)
GPU = DeviceConfig(
    per_host=4, per_switch=2, copy_in_gbps=50, switch_gbps=50, memory_gbps=200, nvlink_gbps=300,
    network_gbps=150, apply_gbps=1000, block_us=1, bucket_us=50, message_us=10, relay_mib=1,
)  # fmt: skip
RATES = ("copy_in_gbps", "memory_gbps", "network_gbps", "apply_gbps")


@st.composite
def weights(draw: st.DrawFn, owners: int) -> Manifest:
    specs, shards = [], []
    for number in range(draw(st.integers(1, 12))):
        rows = draw(st.integers(1, 64))
        specs.append(TensorSpec(f"w{number}", "float32", (rows, draw(st.integers(1, 200_000)))))
        cut = draw(st.integers(0, rows))
        pieces = [piece for piece in ((0, cut), (cut, rows)) if piece[1] > piece[0]]
        shards += [Shard(number, draw(st.integers(0, owners - 1)), start, stop) for start, stop in pieces]
    return Manifest(tuple(specs), tuple(shards))


@st.composite
def pushes(draw: st.DrawFn) -> tuple[Plan, Topology]:
    device = draw(st.sampled_from([CPU, GPU]))
    ranks = device.per_host * draw(st.integers(1, 3))
    manifest = draw(weights(ranks))
    slots = draw(st.sampled_from([0, 2, 3]))
    receivers = tuple(range(draw(st.integers(1, ranks))))
    largest = max(spec.nbytes for spec in manifest.tensors)
    needs = None
    if draw(st.booleans()):
        needs = {
            receiver: {
                spec.name: [tuple((0, n) for n in spec.shape)] for spec in manifest.tensors[receiver % 3 :]
            }
            for receiver in receivers
        }
    plan = plan_push(manifest, receivers, bucket_bytes=largest + 4096, slots=slots, needs=needs)
    return plan, Topology(device, ranks)


@given(pushes())
@settings(max_examples=25, deadline=None)
def test_a_push_is_never_faster_than_its_floor_and_no_link_than_its_rate(push: tuple[Plan, Topology]) -> None:
    plan, topology = push
    result = simulate(plan, topology)
    assert result.seconds >= result.floor_seconds
    rates = topology.rates()
    for link, used in result.traffic.items():
        assert used.peak <= rates[link] * (1 + 1e-9)
        assert used.nbytes <= rates[link] * result.seconds


@given(pushes())
@settings(max_examples=25, deadline=None)
def test_on_one_host_every_link_carries_the_bytes_of_the_plan(push: tuple[Plan, Topology]) -> None:
    plan, topology = push
    topology = replace(topology, ranks=topology.device.per_host, owners=_on_one_host(plan, topology))
    if max(plan.receivers) >= topology.ranks:
        return
    result = simulate(plan, topology)
    per_position = [0] * topology.ranks
    applied = dict.fromkeys(plan.receivers, 0)
    for bucket in plan.buckets:
        for block in bucket.blocks:
            for part in block.parts:
                per_position[topology.owner_place(part.owner)[1]] += block.place(part)[1]
            for receiver in bucket.receivers:
                applied[receiver] += block.nbytes
    for position, nbytes in enumerate(per_position):
        copied = sum(
            task.nbytes
            for task in result.tasks
            if task.stage == "copy_in" and task.lane == f"sender {position}"
        )
        assert copied == nbytes
        if topology.shares_memory or topology.hosts == 1:
            assert result.traffic[f"copy_in:{position}"].nbytes == pytest.approx(nbytes, rel=1e-6, abs=1)
    for receiver, nbytes in applied.items():
        assert result.traffic[f"apply:{receiver}"].nbytes == pytest.approx(nbytes, rel=1e-6, abs=1)
    assert sum(per_position) == plan.nbytes
    assert all(used.nbytes == 0 for link, used in result.traffic.items() if link.startswith("network"))


def _on_one_host(plan: Plan, topology: Topology) -> dict[int, tuple[int, int]]:
    owners = {owner for bucket in plan.buckets for owner in bucket.owners}
    return {owner: (0, owner % topology.device.per_host) for owner in owners}


@given(pushes(), st.floats(0.01, 1), st.sampled_from([0, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_a_delta_waits_for_a_look_at_everything(
    push: tuple[Plan, Topology], share: float, slots: int
) -> None:
    full, topology = push
    manifest = Manifest.whole(full.tensors, owner=topology.ranks - 1)
    size = max(spec.nbytes for spec in manifest.tensors) + 4096
    full = plan_push(manifest, full.receivers, bucket_bytes=size, slots=slots)
    changed = {spec.name: [(0, ceil(spec.rows * share))] for spec in manifest.tensors}
    plan = plan_delta(manifest, full, changed, base=0)
    result = simulate(plan, topology, scanned=full)
    assert result.seconds >= result.floor_seconds
    looked = [
        (task, span) for task, span in zip(result.tasks, result.spans, strict=True) if task.stage == "scan"
    ]
    assert sum(task.nbytes for task, _ in looked) == manifest.nbytes
    known = max(span.end for _, span in looked)
    others = [span for task, span in zip(result.tasks, result.spans, strict=True) if task.stage != "scan"]
    assert all(span.start >= known for span in others)
    copied = sum(task.nbytes for task in result.tasks if task.stage == "copy_in")
    assert copied == plan.nbytes


@given(pushes(), st.sampled_from(RATES), st.floats(1.1, 10))
@settings(max_examples=25, deadline=None)
def test_a_faster_link_makes_no_floor_higher(push: tuple[Plan, Topology], rate: str, factor: float) -> None:
    plan, topology = push
    faster = replace(topology.device, **{rate: getattr(topology.device, rate) * factor})
    before, after = simulate(plan, topology), simulate(plan, replace(topology, device=faster))
    assert after.floor_seconds <= before.floor_seconds * (1 + 1e-9)


@given(pushes(), st.floats(1.1, 10))
@settings(max_examples=25, deadline=None)
def test_a_machine_that_is_faster_throughout_is_never_slower(
    push: tuple[Plan, Topology], factor: float
) -> None:
    """One faster link alone can delay another flow; all of them together cannot."""
    plan, topology = push
    rates = ("copy_in_gbps", "switch_gbps", "memory_gbps", "nvlink_gbps", "network_gbps", "apply_gbps")
    faster = replace(topology.device, **{rate: getattr(topology.device, rate) * factor for rate in rates})
    before, after = simulate(plan, topology), simulate(plan, replace(topology, device=faster))
    assert after.seconds <= before.seconds * (1 + 1e-9)


def test_gpus_behind_one_switch_share_it() -> None:
    specs = [TensorSpec(f"w{number}", "uint8", (10**9,)) for number in range(2)]
    shards = (Shard(0, 0, 0, 10**9), Shard(1, 1, 0, 10**9))
    plan = plan_push(Manifest(tuple(specs), shards), (0,), bucket_bytes=3 * 10**9)
    shared = simulate(plan, Topology(GPU, 4)).stages["copy_in"]
    alone = simulate(plan, Topology(replace(GPU, per_switch=1), 4)).stages["copy_in"]
    assert shared == pytest.approx(2 * alone, rel=0.01)


def test_a_broadcast_enters_each_host_once_and_goes_on_over_nvlink() -> None:
    manifest = Manifest.whole([TensorSpec("w", "uint8", (4 * 10**9,))])
    result = simulate(plan_push(manifest, range(8), bucket_bytes=5 * 10**9), Topology(GPU, 8))
    over_network = sum(used.nbytes for link, used in result.traffic.items() if link.startswith("network"))
    assert over_network == pytest.approx(4e9)
    assert result.traffic["nvlink:3"].nbytes == pytest.approx(3e9)
    assert result.traffic["nvlink:3"].peak == pytest.approx(300e9 * NVLINK_EFFICIENCY)


def test_buckets_overlap_unless_the_ring_is_short() -> None:
    specs = [TensorSpec(f"w{number}", "uint8", (10**8,)) for number in range(12)]
    cpu = Topology(replace(CPU, copy_in_gbps=2.0, apply_gbps=2.0, memory_gbps=100.0), 4)
    times = {
        slots: simulate(
            plan_push(Manifest.whole(specs), (0,), bucket_bytes=10**8 + 256, slots=slots), cpu
        ).seconds
        for slots in (2, 3, 0)
    }
    assert times[0] <= times[3] <= times[2]
    assert times[0] < 0.6 * 12 * (10**8 / 2e9) * 2
