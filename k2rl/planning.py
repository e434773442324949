"""`k2rl plan`: what a push would take on a cluster that need not be there. All of it is simulated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from k2rl.checkpoint_engine.architectures import ARCHITECTURES, DTYPES, Architecture, manifest, tensors
from k2rl.checkpoint_engine.manifest import TensorSpec
from k2rl.checkpoint_engine.moonshot import moonshot_plan, simulate_moonshot
from k2rl.checkpoint_engine.plan import ALIGNMENT, PlanError, plan_delta, plan_push
from k2rl.checkpoint_engine.sharding import Layout
from k2rl.checkpoint_engine.sheets import cluster_names, load_sheet
from k2rl.checkpoint_engine.simulator import Simulation, simulate
from k2rl.checkpoint_engine.topology import Topology
from k2rl.config import DeviceConfig
from k2rl.errors import ConfigError

STRATEGIES = ("broadcast", "shard_aware", "delta", "moonshot")
OUTPUTS = ("text", "json")
GIB = 2**30
MOST_BUCKET_GIB = 1024
#: More ranks would still be simulated, but their plan takes long.
MOST_RANKS = 65536


@dataclass
class Request:
    """What `k2rl plan` is asked for; every field is a key of its command line."""

    model: str = "kimi_k2"
    dtype: str = "fp8"
    cluster: str = "h20"
    #: Trainer ranks and receivers, one of each a GPU; 0: one host.
    gpus: int = 256
    strategy: str = "broadcast"
    #: For `delta`: the share of each tensor's rows that has changed.
    changed: float = 0.05
    #: Tensor parallelism of an inference replica; 0: the model's usual one, as far as it fits.
    tp: int = 0
    #: Ranks over which a replica spreads whole experts; 1: experts are cut like the rest.
    ep: int = 1
    #: Most GiB of a bucket; 0: 1 GiB, or the largest tensor; for `moonshot` 8.
    bucket_gib: float = 0.0
    #: Buckets that a GPU has room for at once.
    slots: int = 4
    output: str = "text"
    #: Where the timeline's picture goes; default: a name of its own under `outputs/plan/`.
    picture: str = ""
    #: Values that replace those of the cluster's sheet.
    device: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A simulated push, and what was asked for with all defaults filled in."""

    request: Request
    device: DeviceConfig
    specs: list[TensorSpec]
    simulation: Simulation


def parse(words: Sequence[str]) -> Request:
    """Read `key=value` words.

    Raises:
        ConfigError: one line that names the word and what there is to choose from.
    """
    request = Request()
    kinds: dict[str, Callable[[str], Any]] = {
        name: type(value) for name, value in asdict(request).items() if name != "device"
    }
    for word in words:
        key, equals, value = word.partition("=")
        if key.startswith("device.") and equals:
            request.device[key.removeprefix("device.")] = value
            continue
        if key not in kinds or not equals:
            raise ConfigError(
                f"{word}: `k2rl plan` takes KEY=VALUE with KEY one of: {', '.join(kinds)}, device.*"
            )
        try:
            setattr(request, key, kinds[key](value))
        except ValueError as error:
            raise ConfigError(f"{word}: {key} is a number") from error
    for key, choices in (
        ("model", tuple(ARCHITECTURES)),
        ("dtype", DTYPES),
        ("strategy", STRATEGIES),
        ("output", OUTPUTS),
    ):
        if getattr(request, key) not in choices:
            raise ConfigError(f"{key}={getattr(request, key)} is not one of: {', '.join(choices)}")
    return request


def plan(request: Request) -> Planned:
    """Plan and simulate.

    Raises:
        ConfigError: the values do not go together; one line.
    """
    model = ARCHITECTURES[request.model]
    device = load_sheet(request.cluster, request.device)
    _complete(request, model, device)
    specs = tensors(model, request.dtype)  # type: ignore[arg-type]
    layout = Layout(request.tp, request.ep, model.experts, model.kv_heads)
    bucket_bytes = math.ceil(request.bucket_gib * GIB)
    try:
        if request.strategy == "moonshot":
            simulation = _moonshot(request, device, specs, bucket_bytes)
        elif request.strategy in ("broadcast", "delta"):
            simulation = _broadcast(request, device, specs, layout, bucket_bytes)
        else:
            simulation = _shard_aware(request, device, specs, layout, bucket_bytes)
    except PlanError as error:
        raise ConfigError(f"bucket_gib={request.bucket_gib:g}, slots={request.slots}: {error}") from error
    return Planned(request, device, specs, simulation)


def _complete(request: Request, model: Architecture, device: DeviceConfig) -> None:
    """Fill in defaults; refuse what does not fit together."""
    per_host = device.per_host
    request.gpus = request.gpus or per_host
    if not 1 <= request.gpus <= MOST_RANKS or request.gpus % per_host:
        raise ConfigError(
            f"gpus={request.gpus} must be a multiple of {per_host}, the GPUs of a host of {request.cluster}, "
            f"and at most {MOST_RANKS}"
        )
    request.tp = request.tp or math.gcd(model.tp, request.gpus)
    if request.tp < 1 or request.gpus % request.tp:
        raise ConfigError(f"tp={request.tp} must divide gpus={request.gpus}")
    if request.ep < 1 or request.tp % request.ep or model.experts % request.ep:
        raise ConfigError(
            f"ep={request.ep} must divide tp={request.tp} and the {model.experts} experts of {request.model}"
        )
    if not 0 <= request.bucket_gib <= MOST_BUCKET_GIB:
        raise ConfigError(f"bucket_gib={request.bucket_gib:g} must be from 0 (default) to {MOST_BUCKET_GIB}")
    if not 0 < request.changed <= 1:
        raise ConfigError(f"changed={request.changed:g} must be above 0 and at most 1")
    if request.slots < 0:
        raise ConfigError(f"slots={request.slots} must be at least 2, or 0 to keep every bucket")
    if request.strategy == "moonshot":
        if device.nvlink_gbps == 0:
            raise ConfigError(
                f"strategy=moonshot broadcasts between GPUs; cluster={request.cluster} has none; take one of "
                + ", ".join(name for name in cluster_names() if name != "cpu")
            )
        request.slots, request.bucket_gib = 2, request.bucket_gib or 8.0


def _moonshot(
    request: Request, device: DeviceConfig, specs: list[TensorSpec], bucket_bytes: int
) -> Simulation:
    pushed = moonshot_plan(specs, request.gpus, bucket_bytes)
    return simulate_moonshot(pushed, Topology(device, request.gpus), 1 / request.tp)


def _broadcast(
    request: Request, device: DeviceConfig, specs: list[TensorSpec], layout: Layout, bucket_bytes: int
) -> Simulation:
    weights, receivers = manifest(specs, request.gpus), range(request.gpus)
    size = bucket_bytes or max(GIB, _largest_unit(specs))
    pushed = plan_push(weights, receivers, bucket_bytes=size, slots=request.slots)
    scanned = None
    if request.strategy == "delta":
        scanned = pushed
        rows = {spec.name: [(0, math.ceil(spec.rows * request.changed))] for spec in specs}
        pushed = plan_delta(weights, scanned, rows, base=0)
    kept = [_share(spec, layout) for spec in specs]
    return simulate(pushed, Topology(device, request.gpus), kept, scanned)


def _shard_aware(
    request: Request, device: DeviceConfig, specs: list[TensorSpec], layout: Layout, bucket_bytes: int
) -> Simulation:
    # Ranks of a replica need as much as each other: the plan of one stands for those of all.
    pushed = plan_push(
        manifest(specs, request.gpus),
        (0,),
        bucket_bytes=bucket_bytes or max(GIB, _largest_unit(specs)),
        slots=request.slots,
        needs={0: layout.needs(specs, 0)},
    )
    return simulate(pushed, Topology(device, request.gpus, stands_for=request.tp))


def _share(spec: TensorSpec, layout: Layout) -> float:
    """The part of a tensor that a rank keeps, on average."""
    if layout.ep > 1 and ".experts." in spec.name:
        return 1 / layout.ep
    box = layout.box(spec, 0)
    assert box is not None
    return math.prod(stop - start for start, stop in box) / math.prod(spec.shape)


def _largest_unit(specs: Sequence[TensorSpec]) -> int:
    units: dict[str, int] = {}
    for spec in specs:
        key = spec.unit or spec.name
        units[key] = units.get(key, 0) + -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return max(units.values())


def as_json(planned: Planned) -> str:
    """One line for programs."""
    request, simulation = planned.request, planned.simulation
    return json.dumps(
        {
            "seconds": round(simulation.seconds, 4),
            "floor_seconds": round(simulation.floor_seconds, 4),
            "floor_by": simulation.floor_by,
            "binds": simulation.binds,
            "binds_seconds": round(simulation.binds_seconds, 4),
            "stages": {stage: round(seconds, 4) for stage, seconds in simulation.stages.items()},
            "buckets": len(simulation.plan.buckets),
            "simulated": True,
            "bytes": sum(spec.nbytes for spec in planned.specs),
            "pushed_bytes": simulation.plan.nbytes,
            "tensors": len(planned.specs),
            **{key: getattr(request, key) for key in ("model", "dtype", "cluster", "gpus", "strategy")},
            **{key: getattr(request, key) for key in ("tp", "ep")},
        }
    )


def picture_path(request: Request) -> Path:
    """Where the picture goes."""
    if request.picture:
        return Path(request.picture)
    name = (
        f"{request.model}-{request.dtype}-{Path(request.cluster).stem}-{request.gpus}-{request.strategy}.svg"
    )
    return Path("outputs") / "plan" / name
