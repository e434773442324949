"""The Ray cluster of a run, and the workers in it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from k2rl.config import ClusterConfig, Config
from k2rl.errors import ConfigError, RunError
from k2rl.workers.colocated import ColocatedWorker
from k2rl.workers.handle import WorkerLostError
from k2rl.workers.placement import bundle
from k2rl.workers.spec import WorkerSpec

#: How often nodes are looked for.
POLL_S = 2.0
#: Ray gives a node of its own half a minute, which a busy machine may need more of.
STARTS, LATE = 3, "timed out during startup"


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """A Ray cluster: one of this run's own, or the one at `cluster.address`."""
    local = config.address == "local"
    # Ray makes its workers nice to others by default; here the worker is the run.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        _begin("local" if local else config.address, local)
    except ConnectionError as error:
        cause = " ".join(str(error.__cause__ or "").split())
        raise ConfigError(f"cluster.address={config.address!r}: {error}{cause and f': {cause}'}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _begin(address: str, local: bool) -> None:
    """Begin or join a cluster; what is late is begun again.

    Raises:
        ConnectionError: there is none at the address.
        RunError: this machine has no time for one.
    """
    for _ in range(STARTS):
        try:
            ray.init(
                address=address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level="error",
                **({"object_store_memory": 256 * 2**20} if local else {}),
            )
        except Exception as error:
            if LATE not in str(error):  # Ray has no class for it
                raise
            late = error
            ray.shutdown()
        else:
            return
    raise RunError(
        f"Ray did not start on this machine in {STARTS} tries; is it busy with others' work?"
    ) from late


async def placed(config: Config, spec: WorkerSpec, patient: bool = False) -> tuple[list[Any], PlacementGroup]:
    """An actor for each worker, those of a replica together, and what is reserved for them.

    Args:
        patient: a cluster that cannot hold them may be waiting for a node that takes the place of another.

    Raises:
        ConfigError: the cluster cannot hold them.
        WorkerLostError: it could, but gives them nothing.
    """
    cluster, ranks = config.cluster, config.inference.tensor_parallel
    wanted = await _bundle_of_now(config, config.deadlines.start_s if patient else 0.0)
    reserved = placement_group([wanted] * (cluster.workers // ranks), strategy=cluster.strategy)
    try:
        await asyncio.wait_for(reserved.ready(), config.deadlines.start_s)
    except TimeoutError:
        remove_placement_group(reserved)
        raise WorkerLostError(
            f"the Ray cluster has not given its room to {cluster.workers} workers within "
            f"deadlines.start_s={config.deadlines.start_s:g}: others hold it, or a node died"
        ) from None
    options = {
        "num_cpus": wanted["CPU"] / ranks,
        "num_gpus": wanted.get("GPU", 0.0) / ranks,
        "max_concurrency": 4096,
        "max_restarts": 0,
    }
    actor = ray.remote(ColocatedWorker)
    strategies = [
        PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=rank // ranks)
        for rank in range(cluster.workers)
    ]
    return [
        actor.options(**options, scheduling_strategy=strategy).remote(spec, rank)
        for rank, strategy in enumerate(strategies)
    ], reserved


async def _bundle_of_now(config: Config, patience_s: float) -> dict[str, float]:
    """See `bundle`, for the nodes that live; asked again until that works or patience ends."""
    end = time.monotonic() + patience_s
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        try:
            return bundle(config.cluster, config.inference.tensor_parallel, nodes)
        except ConfigError:
            if time.monotonic() >= end:
                raise
        await asyncio.sleep(POLL_S)
