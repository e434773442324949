"""What a plan would take on a cluster: its buckets as tasks over the cluster's links. Imports no torch.

Every number that comes out of here is simulated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from k2rl.checkpoint_engine.flows import Span, Task, Traffic, simulate_tasks
from k2rl.checkpoint_engine.plan import Bucket, Plan
from k2rl.checkpoint_engine.topology import Topology, effective

STAGES = ("scan", "copy_in", "transfer", "apply")


@dataclass(frozen=True)
class Simulation:
    """A simulated push; times in seconds."""

    plan: Plan
    seconds: float
    #: No engine that moves these bytes over these links can be faster: the longest that a link needs for its
    #: bytes at its nominal rate, all else free and overlapped.
    floor_seconds: float
    floor_by: str
    #: What takes most of the time: a kind of link, or the calls of a stage.
    binds: str
    binds_seconds: float
    #: Longest that one lane (a device's copies, a receiver's loading) of the stage is occupied.
    stages: dict[str, float]
    #: By link: bytes, and the highest rate, of the simulated host.
    traffic: dict[str, Traffic]
    tasks: list[Task]
    spans: list[Span]


def simulate(
    plan: Plan, topology: Topology, kept: Sequence[float] | None = None, scanned: Plan | None = None
) -> Simulation:
    """Simulate a push by the executor: fill, transfer and apply of different buckets overlap.

    Args:
        plan: of any strategy.
        kept: for `broadcast` and `delta`, the share of each tensor that a receiver copies into its model;
            default: all.
        scanned: the plan of everything in which changes were looked for first. The executor reads as when it
            copies in, at the same rate, and nothing else starts before it is known what has changed.
    """
    builder = _Builder(plan, topology, kept)
    if scanned is not None:
        builder.scan(scanned)
    for bucket in plan.buckets:
        builder.add(bucket)
    device = topology.device
    around = device.push_ms * 1e-3 + 2 * device.message_us * 1e-6
    return measure(plan, topology, builder.tasks, around, scanned)


def measure(
    plan: Plan, topology: Topology, tasks: list[Task], around: float, scanned: Plan | None = None
) -> Simulation:
    """Run tasks on the links of `topology`; `around` seconds go to what surrounds them."""
    rates = effective(topology.rates())
    spans, traffic = simulate_tasks(tasks, rates)
    floors = _floors([plan, scanned] if scanned else [plan], topology, tasks, traffic)
    floor_by = max(floors, key=lambda name: floors[name])
    busy: dict[str, float] = {}
    occupied: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], float] = defaultdict(float)
    for task, span in zip(tasks, spans, strict=True):
        occupied[task.stage, task.lane] += span.end - span.start
        calls[task.stage, task.lane] += task.setup
    stages: dict[str, float] = {}
    for (stage, _), seconds in occupied.items():
        stages[stage] = max(stages.get(stage, 0.0), seconds)
    for name, used in traffic.items():
        _at_least(busy, link_label(name, topology), used.nbytes / rates[name])
    for (stage, _), seconds in calls.items():
        _at_least(busy, f"calls in {stage}, one after the other", seconds)
    binds = max(busy, key=lambda name: busy[name])
    return Simulation(
        plan,
        max((span.done for span in spans), default=0.0) + around,
        floors[floor_by],
        link_label(floor_by, topology),
        binds,
        busy[binds],
        stages,
        traffic,
        tasks,
        spans,
    )


def _at_least(seconds: dict[str, float], label: str, value: float) -> None:
    seconds[label] = max(seconds.get(label, 0.0), value)


def _floors(
    plans: Iterable[Plan], topology: Topology, tasks: Sequence[Task], traffic: Mapping[str, Traffic]
) -> dict[str, float]:
    """Seconds that each link needs for its bytes at its nominal rate.

    What is copied in or scanned is counted host by host: the simulated host has the most loaded one's share
    of each bucket, which over a push is more than any host has.
    """
    nbytes = {name: used.nbytes for name, used in traffic.items()}
    for task in tasks:
        if task.stage in ("scan", "copy_in"):
            for link in task.links:
                nbytes[link] -= task.nbytes
    by_host: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_owner: dict[int, float] = defaultdict(float)
    for bucket in (bucket for plan in plans for bucket in plan.buckets):
        for block in bucket.blocks:
            for part in block.parts:
                by_owner[part.owner] += block.nbytes if len(block.parts) == 1 else block.place(part)[1]
    for owner, size in by_owner.items():
        host, position = topology.owner_place(owner)
        for link in topology.copy_in_links(position):
            by_host[host][link] += size * topology.stands_for
    for link in nbytes:
        nbytes[link] += max((loads[link] for loads in by_host.values()), default=0.0)
    return {name: nbytes[name] / rate for name, rate in topology.rates().items()}


def link_label(name: str, topology: Topology) -> str:
    """A link's kind in words."""
    kind = name.split(":")[0]
    on_cpu = topology.shares_memory
    return {
        "memory": "host memory",
        "copy_in": "copy into the arena" if on_cpu else "PCIe of a GPU",
        "switch": "PCIe switch, shared",
        "nvlink": "NVLink",
        "network": "network",
        "apply": "copy into the model" if on_cpu else "device memory",
    }[kind]


class _Builder:
    """The tasks of one host, bucket after bucket."""

    def __init__(self, plan: Plan, topology: Topology, kept: Sequence[float] | None) -> None:
        self.tasks: list[Task] = []
        self._plan, self._topology = plan, topology
        self._kept = kept
        self._block = topology.device.block_us * 1e-6
        self._bucket = topology.device.bucket_us * 1e-6
        self._message = topology.device.message_us * 1e-6
        places = {receiver: topology.receiver_place(receiver) for receiver in plan.receivers}
        by_host: dict[int, list[int]] = defaultdict(list)
        for receiver, (host, _) in places.items():
            by_host[host].append(receiver)
        self._host = max(sorted(by_host), key=lambda host: len(by_host[host]))
        self._position = {receiver: places[receiver][1] for receiver in by_host[self._host]}
        #: By bucket, its applies here: what the bucket that takes its place waits for.
        self._applied: dict[int, list[int]] = {}
        self._scans: list[int] = []
        self._spread = plan.strategy != "shard_aware"

    def scan(self, full: Plan) -> None:
        """Look for changes in everything; before any `add`.

        Nobody waits for a single bucket: of each position, the rank counts that has most in all.
        """
        nbytes: dict[int, int] = defaultdict(int)
        calls: dict[int, float] = defaultdict(float)
        for bucket in full.buckets:
            for block in bucket.blocks:
                for part in block.parts:
                    nbytes[part.owner] += block.nbytes if len(block.parts) == 1 else block.place(part)[1]
                    calls[part.owner] += self._block
            for owner in bucket.owners:
                calls[owner] += self._bucket
        times = self._topology.stands_for
        loads: dict[int, tuple[int, float]] = {}
        for owner, size in nbytes.items():
            _, position = self._topology.owner_place(owner)
            loads[position] = max(loads.get(position, (0, 0.0)), (size, calls[owner]))
        self._scans = [
            self._task(
                "scan",
                f"sender {position}",
                [],
                setup=calls_s * times,
                nbytes=size * times,
                links=self._topology.copy_in_links(position),
                latency=self._message,
                bucket=-1,
            )
            for position, (size, calls_s) in sorted(loads.items())
        ]

    def add(self, bucket: Bucket) -> None:
        payload = sum(block.nbytes for block in bucket.blocks)
        mine, at_host, blocks = self._sources(bucket)
        before = self._applied.get(bucket.after, []) + self._scans
        filled = self._fill(bucket, mine, blocks, before)
        audience = [receiver for receiver in bucket.receivers if receiver in self._position]
        if self._spread:
            remote = payload - (min(at_host.values()) if len(at_host) == self._topology.hosts else 0)
        else:
            remote = payload - at_host.get(self._host, 0)
        arrived = self._transfer(bucket, audience, payload, remote, mine, filled)
        kept = float(payload)
        if self._kept is not None:
            kept = sum(block.nbytes * self._kept[block.tensor] for block in bucket.blocks)
        self._applied[bucket.index] = [
            self._task(
                "apply",
                f"receiver {receiver}",
                arrived[self._position[receiver]],
                setup=self._bucket + self._block * len(bucket.blocks),
                nbytes=kept,
                links=self._topology.apply_links(self._position[receiver]),
                latency=self._message,
                bucket=bucket.index,
            )
            for receiver in audience
        ]

    def _sources(self, bucket: Bucket) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
        """Bytes each position fills on the host where that is most; bytes by host; blocks by position."""
        nbytes: dict[tuple[int, int], int] = defaultdict(int)
        count: dict[tuple[int, int], int] = defaultdict(int)
        for block in bucket.blocks:
            for part in block.parts:
                place = self._topology.owner_place(part.owner)
                nbytes[place] += block.nbytes if len(block.parts) == 1 else block.place(part)[1]
                count[place] += 1
        most: dict[int, int] = {}
        blocks: dict[int, int] = {}
        at_host: dict[int, int] = defaultdict(int)
        for (host, position), size in nbytes.items():
            at_host[host] += size
            most[position] = max(most.get(position, 0), size)
            blocks[position] = max(blocks.get(position, 0), count[host, position])
        return most, dict(at_host), blocks

    def _fill(
        self, bucket: Bucket, mine: Mapping[int, int], blocks: Mapping[int, int], after: Sequence[int]
    ) -> list[int]:
        times = self._topology.stands_for
        return [
            self._task(
                "copy_in",
                f"sender {position}",
                after,
                setup=self._bucket + self._block * blocks[position] * times,
                nbytes=mine[position] * times,
                links=self._topology.copy_in_links(position),
                latency=self._message,
                bucket=bucket.index,
            )
            for position in sorted(mine)
        ]

    def _transfer(
        self,
        bucket: Bucket,
        audience: Sequence[int],
        payload: int,
        remote: int,
        mine: Mapping[int, int],
        filled: list[int],
    ) -> dict[int, list[int]]:
        """What each position must wait for before it has the bucket."""
        topology = self._topology
        spread = self._spread
        latency = topology.relay_latency(remote) if spread else self._message
        if topology.shares_memory:
            arrived = filled
            if topology.hosts > 1 and remote:
                links = topology.network_links(0)
                arrived = [self._network(bucket, "network", filled, remote, links, latency)]
            return dict.fromkeys(self._position.values(), arrived)
        arrived_at: dict[int, list[int]] = {}
        over_network: dict[int, float] = {}
        # A broadcast enters the host once, over all adapters, and goes on over NVLink; otherwise each device
        # fetches its own from where it lies.
        positions = range(topology.device.per_host) if spread else [self._position[r] for r in audience]
        tasks: list[int] = []
        for position in positions:
            size = remote / topology.device.per_host if spread else float(remote)
            if topology.hosts > 1 and size:
                over_network[position] = size
                lane = f"network {position}"
                tasks.append(
                    self._network(bucket, lane, filled, size, topology.network_links(position), latency)
                )
        for number, position in enumerate(positions):
            before = filled + (tasks if spread else tasks[number : number + 1])
            local = payload - over_network.get(position, 0.0) - min(mine.get(position, 0), payload)
            arrived_at[position] = before
            if local > 0:
                arrived_at[position] = [
                    self._task(
                        "transfer",
                        f"nvlink {position}",
                        before,
                        setup=0.0,
                        nbytes=local,
                        links=(f"nvlink:{position}",),
                        bucket=bucket.index,
                    )
                ]
        return arrived_at

    def _network(
        self,
        bucket: Bucket,
        lane: str,
        after: list[int],
        nbytes: float,
        links: Sequence[str],
        latency: float,
    ) -> int:
        return self._task(
            "transfer",
            lane,
            after,
            setup=self._bucket,
            nbytes=nbytes,
            links=links,
            latency=latency,
            bucket=bucket.index,
        )

    def _task(
        self,
        stage: str,
        lane: str,
        after: Sequence[int],
        *,
        setup: float,
        nbytes: float,
        links: Sequence[str],
        latency: float = 0.0,
        bucket: int,
    ) -> int:
        self.tasks.append(Task(stage, lane, tuple(after), setup, nbytes, links, latency, bucket))
        return len(self.tasks) - 1
