"""Moonshot's open-source checkpoint-engine as a model, to check the simulator against what they published.

It follows what their code does in a broadcast update (`ParameterServer._update_per_bucket`, state of 2025):

- Each rank owns a run of as many tensors as any other and cuts it into buckets of its own; buckets are never
  shared between ranks. In each round every rank copies its next bucket to its GPU and waits for that copy
  (all ranks at once: the PCIe switches are shared).
- Then the buckets of the round are broadcast one after the other; before each, its owner copies it
  on its device into the buffer that is shared with the inference engine.
- While a bucket is broadcast the inference engine loads the one before: Python, tensor by tensor. Between
  two buckets all ranks wait for each other, for the broadcast and for the slowest loader.

Everything that comes out of here is simulated.
"""

from __future__ import annotations

import math
from collections import defaultdict

import msgspec

from k2rl.checkpoint_engine.flows import Task
from k2rl.checkpoint_engine.manifest import TensorSpec
from k2rl.checkpoint_engine.plan import ALIGNMENT, Block, Bucket, Part, Plan
from k2rl.checkpoint_engine.simulator import Simulation, measure
from k2rl.checkpoint_engine.topology import GIGA, Topology

#: Fitted to the six published rows, one set for all of them. Seconds that an engine's `load_weights` takes
#: for each tensor of the checkpoint, whether it keeps a part of it or not.
LOAD_TENSOR_S = 52.6e-6
#: Fitted likewise: by what share of its time the slowest loader is slower with e times as many ranks.
#: Loaders differ from bucket to bucket, every bucket waits for all, and the slowest of n grows with log n.
STRAGGLE = 0.187
#: Fitted likewise: request, IPC handles, buffers, post-processing and the end of the process group.
UPDATE_S = 0.91
#: A collective of one number and a message to the engine, for each bucket: assumed.
SYNC_S = 1e-3


class PublishedRow(msgspec.Struct, frozen=True):
    """A row of the benchmark table in the README of github.com/MoonshotAI/checkpoint-engine (vLLM 0.10.2rc1).

    The bucket size is what was free on their GPUs; `gather_s`, spent once before, is no part of `update_s`.
    """

    model: str
    dtype: str
    cluster: str
    gpus: int
    bucket_gib: float
    gather_s: float
    update_s: float


PUBLISHED = (
    PublishedRow("glm_4_5_air", "bf16", "h800", 8, 3.02, 0.12, 3.47),
    PublishedRow("qwen3_235b_a22b", "bf16", "h800", 8, 2.67, 0.33, 6.22),
    PublishedRow("deepseek_v31", "fp8", "h20", 16, 5.39, 1.17, 10.19),
    PublishedRow("kimi_k2", "fp8", "h20", 16, 5.89, 1.33, 14.36),
    PublishedRow("deepseek_v31", "fp8", "h20", 256, 8.00, 0.80, 11.33),
    PublishedRow("kimi_k2", "fp8", "h20", 256, 8.00, 1.22, 16.04),
)


def moonshot_plan(specs: list[TensorSpec], ranks: int, bucket_bytes: int) -> Plan:
    """Their buckets in their order: round after round, in each round one bucket a rank."""
    sizes = [-(-spec.nbytes // ALIGNMENT) * ALIGNMENT for spec in specs]
    bucket_bytes = max(bucket_bytes, *sizes)
    each = -(-len(specs) // ranks)
    rounds: dict[int, list[list[Block]]] = defaultdict(list)
    for owner in range(ranks):
        blocks: list[Block] = []
        used = turn = 0
        for index in range(owner * each, min((owner + 1) * each, len(specs))):
            if used + sizes[index] > bucket_bytes:
                rounds[turn].append(blocks)
                blocks, used, turn = [], 0, turn + 1
            spec = specs[index]
            box = tuple((0, length) for length in spec.shape)
            blocks.append(Block(index, box, used, spec.nbytes, (Part(owner, 0, spec.rows),)))
            used += sizes[index]
        if blocks:
            rounds[turn].append(blocks)
    buckets: list[Bucket] = []
    receivers = tuple(range(ranks))
    for turn in sorted(rounds):
        for blocks in rounds[turn]:
            number = len(buckets)
            used = blocks[-1].offset + sizes[blocks[-1].tensor]
            offset = number % 2 * bucket_bytes
            buckets.append(Bucket(number, offset, used, receivers, tuple(blocks), max(number - 2, -1)))
    return Plan("broadcast", tuple(specs), 2 * bucket_bytes, 2, tuple(buckets), receivers)


def simulate_moonshot(
    plan: Plan,
    topology: Topology,
    kept: float,
    *,
    load_tensor_s: float = LOAD_TENSOR_S,
    straggle: float = STRAGGLE,
    update_s: float = UPDATE_S,
) -> Simulation:
    """Simulate their update with a plan of `moonshot_plan`; `kept` is the share that a receiver copies."""
    tasks: list[Task] = []
    device = topology.device
    devices = device.per_host
    load_tensor_s *= 1 + straggle * math.log(topology.ranks)
    synced: list[int] = []
    loaded: list[int] = []
    for turn in _rounds(plan):
        ready = _copies(tasks, turn, topology, synced)
        for bucket in turn:
            size = float(sum(block.nbytes for block in bucket.blocks))
            before = [*synced, *ready]
            onto_buffer = size / (device.apply_gbps * GIGA)
            # The ring enters the host on every adapter and goes around it over NVLink, in small pieces.
            sent = []
            if topology.hosts > 1:
                links = topology.network_links(0)
                share = size / devices
                sent.append(_add(tasks, "transfer", "network", before, onto_buffer, share, links, bucket))
            local = size * (devices - 1) / devices
            links = ("nvlink:0",)
            sent.append(_add(tasks, "transfer", "nvlink", before, onto_buffer, local, links, bucket))
            synced = [_add(tasks, "wait", "ranks", [*sent, *loaded], SYNC_S, 0.0, (), bucket)]
            calls = len(bucket.blocks) * load_tensor_s
            links = topology.apply_links(0)
            loaded = [_add(tasks, "apply", "receiver 0", synced, calls, size * kept, links, bucket)]
    return measure(plan, topology, tasks, update_s)


def _rounds(plan: Plan) -> list[list[Bucket]]:
    rounds: list[list[Bucket]] = []
    last = -1
    for bucket in plan.buckets:
        owner = bucket.owners[0]
        if not rounds or owner <= last:
            rounds.append([])
        rounds[-1].append(bucket)
        last = owner
    return rounds


def _copies(tasks: list[Task], turn: list[Bucket], topology: Topology, after: list[int]) -> list[int]:
    """The copies to the device that open a round; on each position the largest of all hosts'."""
    most: dict[int, int] = defaultdict(int)
    for bucket in turn:
        _, position = topology.owner_place(bucket.owners[0])
        most[position] = max(most[position], bucket.nbytes)
    return [
        _add(
            tasks,
            "copy_in",
            f"sender {position}",
            after,
            0.0,
            float(most[position]),
            topology.copy_in_links(position),
            turn[0],
        )
        for position in sorted(most)
    ]


def _add(
    tasks: list[Task],
    stage: str,
    lane: str,
    after: list[int],
    setup: float,
    nbytes: float,
    links: tuple[str, ...],
    bucket: Bucket,
) -> int:
    tasks.append(Task(stage, lane, tuple(after), setup, nbytes, links, bucket=bucket.index))
    return len(tasks) - 1
