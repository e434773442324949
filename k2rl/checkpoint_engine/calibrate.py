"""A device sheet of this machine: measured pushes, and the rates with which the simulator reproduces them.

A measurement is a function from a plan to seconds, such as `LocalPushes.push`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from k2rl.checkpoint_engine.manifest import Manifest, TensorSpec
from k2rl.checkpoint_engine.plan import Plan, plan_push
from k2rl.checkpoint_engine.simulator import simulate
from k2rl.checkpoint_engine.topology import Topology
from k2rl.config import DeviceConfig

#: What a fit may change, in the order in which it tries.
FITTED = ("apply_gbps", "copy_in_gbps", "memory_gbps", "block_us", "bucket_us", "push_ms", "network_gbps")
#: Weight of staying at the first guess, beside the errors of the records: decides only what they leave open.
PRIOR = 1e-4
#: Factors a fit tries, from coarse to fine.
STEPS = (2.0, 1.4, 1.15, 1.05, 1.02, 1.005)
MIB = 2**20


@dataclass(frozen=True)
class Record:
    """A measured push; the topology's device is the one to be fitted, its values do not matter."""

    plan: Plan
    topology: Topology
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A sheet, and by how much of the measured time it is off, record by record."""

    device: DeviceConfig
    errors: list[float]

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors), default=0.0)


def measure_pushes(
    plans: Iterable[Plan], topology: Topology, push: Callable[[Plan], float], repeats: int = 9
) -> list[Record]:
    """Measure each plan; the median of `repeats`, after one that only warms up.

    The repeats go round all plans in turn: what else the machine does then falls on all of them alike.
    """
    planned = list(plans)
    seconds: list[list[float]] = [[] for _ in planned]
    for turn in range(repeats + 1):
        for number, plan in enumerate(planned):
            took = push(plan)
            if turn:
                seconds[number].append(took)
    return [Record(plan, topology, median(took)) for plan, took in zip(planned, seconds, strict=True)]


def fit(records: Sequence[Record], guess: DeviceConfig, keys: Sequence[str] = FITTED) -> Fit:
    """The sheet that reproduces the records best; what they cannot tell stays at the guess.

    Args:
        guess: such as micro-measurements give; decides what the records leave open.
        keys: the values that may change; `network_gbps` only if a record has several hosts.

    Raises:
        ValueError: no records, or one without a positive time.
    """
    if not records or any(record.seconds <= 0 for record in records):
        raise ValueError("a fit needs measured pushes, each of more than 0 seconds")
    free = [
        key for key in keys if key != "network_gbps" or any(record.topology.hosts > 1 for record in records)
    ]
    device, best = guess, _loss(records, guess, guess)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for key in free:
                for factor in (step, 1 / step):
                    changed = replace(device, **{key: getattr(device, key) * factor})
                    loss = _loss(records, changed, guess)
                    if loss < best * (1 - 1e-6):
                        device, best, improved = changed, loss, True
                        break
    return Fit(device, errors(records, device))


def errors(records: Iterable[Record], device: DeviceConfig) -> list[float]:
    """Predicted over measured time, minus one, of each record."""
    return [predict(record, device) / record.seconds - 1 for record in records]


def predict(record: Record, device: DeviceConfig) -> float:
    """Simulated seconds of a measured push."""
    return simulate(record.plan, replace(record.topology, device=device)).seconds


def _loss(records: Sequence[Record], device: DeviceConfig, guess: DeviceConfig) -> float:
    # Squares of the logarithm: half the time is as wrong as twice.
    off = sum(math.log(predict(record, device) / record.seconds) ** 2 for record in records) / len(records)
    away = 0.0
    for key, value in asdict(guess).items():
        if value > 0:
            away += math.log(getattr(device, key) / value) ** 2
    return off + PRIOR * away


def plans_to_measure(largest_bytes: int = 256 * MIB) -> tuple[list[Plan], list[Plan]]:
    """Pushes from one rank to one receiver that differ in size, tensors and buckets: to fit, and held out."""
    shapes = [(1.0, 8.0, 32.0), (1.0, 1.0, 16.0), (0.25, 8.0, 32.0), (0.25, 0.0625, 4.0), (0.5, 4.0, 8.0)]
    held_out = [(0.75, 2.0, 24.0), (0.5, 0.25, 12.0), (0.125, 4.0, 16.0)]
    return (
        [_local_plan(largest_bytes, *shape) for shape in shapes],
        [_local_plan(largest_bytes, *shape) for shape in held_out],
    )


def _local_plan(largest_bytes: int, share: float, tensor_mib: float, bucket_mib: float) -> Plan:
    """`share` of the bytes as tensors of one size; ring of three."""
    size = int(tensor_mib * MIB)
    count = max(1, int(largest_bytes * share) // size)
    specs = (TensorSpec(f"weight.{number}", "uint8", (size,)) for number in range(count))
    return plan_push(Manifest.whole(specs), (0,), bucket_bytes=int(bucket_mib * MIB), slots=3)
