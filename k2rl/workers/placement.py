"""Which workers belong together, what they reserve in Ray, and which cores of a host each of them gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from k2rl.config import ClusterConfig
from k2rl.errors import ConfigError
from k2rl.workers.spec import Place, Site

Node = Mapping[str, float]


def bundle(config: ClusterConfig, tensor_parallel: int, nodes: Sequence[Node]) -> dict[str, float]:
    """What to reserve for the workers of one replica, all on one node, so that every replica has as much.

    Args:
        tensor_parallel: workers of a replica.
        nodes: the resources of each node of the cluster, by Ray's names.

    Raises:
        ConfigError: the cluster cannot hold so many, so that Ray would wait for them without end.
    """
    replicas, gpus = config.workers // tensor_parallel, config.gpus_per_worker
    most_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    if gpus * tensor_parallel > most_gpus:
        wish = _wish("gpus", gpus, tensor_parallel)
        raise ConfigError(f"{wish}, but no node of the Ray cluster has more than {most_gpus:g}")
    large = [node for node in nodes if node.get("GPU", 0.0) >= gpus * tensor_parallel]
    most_cpus = max(node.get("CPU", 0.0) for node in large)
    cpus = config.cpus_per_worker or _largest_share(config, tensor_parallel, large)
    if cpus * tensor_parallel > most_cpus:
        kind = "node with such GPUs" if gpus else "node of the Ray cluster"
        raise ConfigError(
            f"{_wish('cpus', cpus, tensor_parallel)}, but no {kind} has more than {most_cpus:g}; "
            "0 reserves what there is"
        )
    wanted = {"CPU": cpus * tensor_parallel, "GPU": gpus * tensor_parallel}
    room = _room(config, wanted, large)
    if room < replicas:
        of = f" of {tensor_parallel} workers each" if tensor_parallel > 1 else ""
        each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise ConfigError(
            f"cluster.workers={config.workers} with {each} for each of them do not fit the Ray cluster with "
            f"cluster.strategy={config.strategy}: it has room for {room} of {replicas} replicas{of}"
        )
    return {name: amount for name, amount in wanted.items() if amount}


def _wish(what: str, each: float, tensor_parallel: int) -> str:
    together = f" for each of {tensor_parallel} workers on a node" if tensor_parallel > 1 else ""
    return f"cluster.{what}_per_worker={each:g}{together}"


def _room(config: ClusterConfig, wanted: Node, nodes: Sequence[Node]) -> int:
    """How many replicas fit."""
    each = [
        min(int((node.get(name, 0.0) + 1e-6) // amount) for name, amount in wanted.items() if amount)
        for node in nodes
    ]
    if config.strategy == "STRICT_PACK":
        return max(each)
    if config.strategy == "STRICT_SPREAD":
        return sum(count > 0 for count in each)
    return sum(each)


def _largest_share(config: ClusterConfig, tensor_parallel: int, nodes: Sequence[Node]) -> float:
    """The most CPUs that every worker can have; all nodes are used if that gives them more."""
    replicas = config.workers // tensor_parallel
    shares = sorted(
        {
            _whole(node.get("CPU", 0.0) / (count * tensor_parallel))
            for node in nodes
            for count in range(1, replicas + 1)
        },
        reverse=True,
    )
    for cpus in shares:
        wanted = {"CPU": cpus * tensor_parallel, "GPU": config.gpus_per_worker * tensor_parallel}
        if cpus and _room(config, wanted, nodes) >= replicas:
            return cpus
    return shares[-1] or 1.0


def _whole(cpus: float) -> float:
    """Ray reserves whole CPUs, or parts of one, to four digits."""
    return float(int(cpus)) if cpus >= 1 else int(cpus * 1e4) / 1e4


def places(
    sites: Sequence[Site], tensor_parallel: int, meeting_point: str, dtype: str, serves: bool
) -> list[Place]:
    """The places of workers that were put on these sites, by rank.

    Workers on one node get equal shares of its cores; with fewer cores than workers, some share one. Every
    `tensor_parallel` following ones are a replica, which the first of them leads.
    """
    hosts = {node: number for number, node in enumerate(dict.fromkeys(site.node for site in sites))}
    cores = _shares(sites)
    found = []
    for rank, site in enumerate(sites):
        leads = serves and rank % tensor_parallel == 0
        own = range(rank, rank + tensor_parallel) if leads else range(0)
        found.append(
            Place(
                rank=rank,
                world=len(sites),
                meeting_point=meeting_point if len(sites) > 1 else "",
                dtype=dtype,
                host=hosts[site.node],
                listen=site.address if len(hosts) > 1 else "",
                cores=cores[rank],
                engine_cores=tuple(dict.fromkeys(core for member in own for core in cores[member])),
                engine_gpus=tuple(gpu for member in own for gpu in sites[member].gpus),
            )
        )
    return found


def _shares(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    """The cores of each worker."""
    found = []
    for rank, site in enumerate(sites):
        here = [other for other, its in enumerate(sites) if its.node == site.node]
        share = max(len(site.cores) // len(here), 1)
        first = here.index(rank) * share
        found.append(tuple(site.cores[(first + i) % len(site.cores)] for i in range(share)))
    return found
