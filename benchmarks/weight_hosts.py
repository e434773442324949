"""Weights from host to host: k2rl's relay beside gloo's own broadcast, on network namespaces. Needs root.

    python benchmarks/weight_hosts.py                    # links as fast as the processor
    python benchmarks/weight_hosts.py --megabits 1000    # links that set the limit

Three hosts with one process each, connected by veth pairs and a bridge. The ways take turns, round after
round: gloo's broadcast of everything as one tensor, of one bucket after the other, the relay with everything
on host 0, and the relay with the rows of every tensor spread over the hosts, as FSDP2 has them. The weights
are layers of SmolLM2-135M in float32. The wire's bytes are the kernel's counters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from k2rl.checkpoint_engine.manifest import Manifest, Shard, TensorSpec
from k2rl.checkpoint_engine.plan import Bucket, plan_push
from k2rl.checkpoint_engine.relay import HostRelay
from k2rl.checkpoint_engine.runs import Run, runs
from tests.netns import INTERFACE, Host, network

PORT = 29511
LIMIT = timedelta(seconds=120)
#: A layer of SmolLM2-135M.
LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), *[(1536, 576)] * 2, (576, 1536), (576,), (576,)]
WAYS = ONE_TENSOR, BUCKETS, WHOLE, SPREAD = (
    "broadcast, one tensor",
    "broadcast, buckets",
    "relay",
    "relay, rows spread",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--layers", type=int, default=18, help="the payload, 14.2 MB each")
    parser.add_argument("--bucket", type=int, default=64, help="mebibytes")
    parser.add_argument("--megabits", type=int, help="what a link sends in a second (default: no limit)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is None:
        with network(options.hosts, options.megabits) as hosts:
            drive(options, hosts)
    else:
        work(options)


def drive(options: argparse.Namespace, hosts: list[Host]) -> None:
    """Start a process on each host, tell them what to do next, and count what passed."""
    words = [sys.executable, __file__, *sys.argv[1:], "--store", hosts[0].address]
    ranks = [
        subprocess.Popen(
            host.command(*words, "--rank", str(rank)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    sent: dict[str, list[int]] = {}
    for round_number in range(options.rounds + 1):
        for way in WAYS:
            before = [host.sent_bytes() for host in hosts]
            for rank in ranks:
                print(way, file=rank.stdin, flush=True)
            took = max(float(json.loads(rank.stdout.readline())) for rank in ranks if rank.stdout)
            if round_number:  # the first one warms up
                seconds[way].append(took)
            sent[way] = [host.sent_bytes() - b for host, b in zip(hosts, before, strict=True)]
    for rank in ranks:
        rank.communicate(timeout=30)
    report(options, seconds, sent)


def report(options: argparse.Namespace, seconds: dict[str, list[float]], sent: dict[str, list[int]]) -> None:
    payload = payload_bytes(options)
    ideal = payload * (options.hosts - 1)
    limit = f"{options.megabits} Mbit/s" if options.megabits else "no limit"
    print(f"{options.hosts} hosts, {payload / 1e6:.0f} MB, buckets of {options.bucket} MiB, links: {limit}")
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    best = min(medians[ONE_TENSOR], medians[BUCKETS])
    for way, median in medians.items():
        rounds = " ".join(f"{found:.3f}" for found in seconds[way])
        wire = " + ".join(f"{count / payload:.3f}" for count in sent[way])
        print(f"{way:22s} {median:.3f} s  {payload / median / 1e6:7.1f} MB/s  {best / median:.2f}x broadcast")
        print(
            f"{'':22s} rounds {rounds}; sent, in payloads: {wire} = {sum(sent[way]) / ideal:.3f}x the ideal"
        )


def payload_bytes(options: argparse.Namespace) -> int:
    last, _ = planned(options, 1)[-1]
    return last.offset + last.nbytes


def planned(options: argparse.Namespace, owners: int) -> list[tuple[Bucket, list[Run]]]:
    """Buckets, and who has what of them: rank 0 everything, or each owner its share of each tensor's rows."""
    shapes = LAYER * options.layers
    specs = [TensorSpec(str(index), "float32", shape) for index, shape in enumerate(shapes)]
    shards = [
        Shard(index, owner, spec.rows * owner // owners, spec.rows * (owner + 1) // owners)
        for index, spec in enumerate(specs)
        for owner in range(owners)
    ]
    plan = plan_push(Manifest(tuple(specs), tuple(shards)), [0], bucket_bytes=options.bucket << 20)
    return [(bucket, runs(bucket, {owner: owner for owner in range(owners)})) for bucket in plan.buckets]


def work(options: argparse.Namespace) -> None:
    """One host: does what each line says, and answers with the seconds it took."""
    torch.set_num_threads(1)
    rank, size = options.rank, options.hosts
    store = TCPStore(options.store, PORT, is_master=rank == 0, wait_for_workers=False, timeout=LIMIT)
    settings = ProcessGroupGloo._Options()
    settings._timeout = LIMIT
    settings._threads = 2
    settings._devices = [ProcessGroupGloo.create_device(interface=INTERFACE)]
    group = ProcessGroupGloo(PrefixStore("plain", store), rank, size, settings)
    relay = HostRelay(rank, range(size), store, 0, LIMIT.total_seconds())
    plans = {way: planned(options, size if way == SPREAD else 1) for way in WAYS}
    weights = torch.zeros(payload_bytes(options), dtype=torch.uint8)

    def memory(bucket: Bucket) -> torch.Tensor:
        return weights[bucket.offset : bucket.offset + bucket.nbytes]

    def go(way: str) -> None:
        if way == ONE_TENSOR:
            group.broadcast(weights, 0).wait()
            return
        for bucket, moved in plans[way]:
            if way == BUCKETS:
                group.broadcast(memory(bucket), 0).wait()
            else:
                relay.transfer(memory(bucket), moved, number=bucket.index)

    for number, line in enumerate(sys.stdin, start=1):
        way = line.strip()
        places = [
            (run.source, memory(bucket)[run.offset : run.offset + run.nbytes])
            for bucket, moved in plans[way]
            for run in moved
        ]
        for source, place in places:
            place.fill_(number if source == rank else 0)
        group.barrier().wait()
        started = time.perf_counter()
        go(way)
        group.barrier().wait()
        print(time.perf_counter() - started, flush=True)
        assert all(bool((place == number).all()) for _, place in places), f"{way} brought something else"


if __name__ == "__main__":
    main()
