"""What is reserved fits, and everybody gets a share. No cluster: nodes as numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2rl.config import ClusterConfig
from k2rl.errors import ConfigError
from k2rl.workers.placement import bundle, places
from k2rl.workers.spec import Place, Site

Nodes = list[dict[str, float]]

nodes = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(1, 64)}, optional={"GPU": st.integers(1, 8)}), min_size=1
)
strategies = st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])


def packed(wanted: dict[str, float], count: int, strategy: str, nodes: Nodes) -> bool:
    """Whether so many bundles can really be put on these nodes, one after the other."""
    left = [dict(node) for node in nodes]
    placed_on: list[int] = []
    for _ in range(count):
        for number, node in enumerate(left):
            if strategy == "STRICT_SPREAD" and number in placed_on:
                continue
            if all(node.get(name, 0) >= amount - 1e-3 for name, amount in wanted.items()):
                for name, amount in wanted.items():
                    node[name] -= amount
                placed_on.append(number)
                break
        else:
            return False
    return strategy != "STRICT_PACK" or any(packed(wanted, count, "PACK", [node]) for node in nodes)


@given(nodes, st.integers(1, 6), st.integers(1, 4), st.integers(0, 20), st.integers(0, 4), strategies)
def test_a_reservation_is_refused_or_fits(
    nodes: Nodes, replicas: int, ranks: int, cpus: int, gpus: int, strategy: str
) -> None:
    config = ClusterConfig(
        workers=replicas * ranks, cpus_per_worker=cpus, gpus_per_worker=float(gpus), strategy=strategy
    )
    asked = {"CPU": float(max(cpus, 1) * ranks), "GPU": float(gpus * ranks)}
    asked = {name: amount for name, amount in asked.items() if amount}
    if cpus and not packed(asked, replicas, strategy, nodes):
        with pytest.raises(ConfigError, match=r"^cluster\.[^\n]*$"):
            bundle(config, ranks, nodes)
        return
    try:
        wanted = bundle(config, ranks, nodes)
    except ConfigError:
        assert not cpus
        return
    assert packed(wanted, replicas, strategy, nodes)
    assert wanted["CPU"] == asked["CPU"] or not cpus
    assert wanted.get("GPU", 0) == gpus * ranks


@given(nodes, st.integers(1, 6), strategies)
def test_without_a_wish_workers_get_the_most_that_all_can_have(
    nodes: Nodes, workers: int, strategy: str
) -> None:
    config = ClusterConfig(workers=workers, strategy=strategy)
    try:
        cpus = bundle(config, 1, nodes)["CPU"]
    except ConfigError:
        assert strategy == "STRICT_SPREAD"
        assert workers > len(nodes)
        return
    more = int(cpus) + 1
    assert not packed({"CPU": float(more)}, workers, strategy, nodes)


def test_the_message_names_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"cpus_per_worker=64, but no node of the Ray cluster has more than 8; 0 reserves"
    ):
        bundle(ClusterConfig(cpus_per_worker=64), 1, [{"CPU": 2.0}, {"CPU": 8.0}])
    with pytest.raises(
        ConfigError, match=r"gpus_per_worker=1, but no node of the Ray cluster has more than 0"
    ):
        bundle(ClusterConfig(gpus_per_worker=1), 1, [{"CPU": 2.0}])
    with pytest.raises(
        ConfigError, match=r"workers=4 with 2 CPUs for each of them do not fit .* room for 2 of 4 replicas$"
    ):
        bundle(ClusterConfig(workers=4, cpus_per_worker=2), 1, [{"CPU": 4.0}])


def test_gpus_are_shared_in_parts() -> None:
    node = {"CPU": 16.0, "GPU": 1.0}
    assert bundle(ClusterConfig(workers=2, gpus_per_worker=0.5), 1, [node]) == {"CPU": 8.0, "GPU": 0.5}
    with pytest.raises(ConfigError, match="room for 2 of 3"):
        bundle(ClusterConfig(workers=3, gpus_per_worker=0.5), 1, [node])


def site(node: str, cores: int = 4, gpu: str = "") -> Site:
    return Site(node, f"10.0.0.{node}", 1, tuple(range(cores)), (gpu,) if gpu else (), "float32")


def test_workers_of_a_node_share_its_cores_and_the_first_of_a_replica_leads_it() -> None:
    sites = [site("1", gpu="0"), site("1", gpu="1"), site("2", gpu="0"), site("2", gpu="1")]
    found = places(sites, 2, "10.0.0.1:5", "float32", serves=True)
    assert [(place.rank, place.host, place.leads) for place in found] == [
        *((0, 0, True), (1, 0, False), (2, 1, True), (3, 1, False))
    ]
    assert [place.cores for place in found] == [(0, 1), (2, 3), (0, 1), (2, 3)]
    assert [place.engine_cores for place in found] == [(0, 1, 2, 3), (), (0, 1, 2, 3), ()]
    assert [place.engine_gpus for place in found] == [("0", "1"), (), ("0", "1"), ()]
    assert {place.listen for place in found} == {"10.0.0.1", "10.0.0.2"}


def test_one_worker_has_everything_and_meets_nobody() -> None:
    assert places([site("1")], 1, "10.0.0.1:5", "float32", serves=True) == [
        Place(0, 1, "", "float32", 0, "", (0, 1, 2, 3), (0, 1, 2, 3))
    ]
    (place,) = places([site("1")], 1, "10.0.0.1:5", "float32", serves=False)
    assert not place.leads


@given(st.lists(st.sampled_from("123"), min_size=1, max_size=9), st.integers(1, 8))
def test_no_core_is_idle_or_has_two_owners_where_there_are_enough(nodes: list[str], cores: int) -> None:
    found = places([site(node, cores) for node in nodes], 1, "h:1", "float32", serves=True)
    for node in set(nodes):
        shares = [place.cores for place, its in zip(found, nodes, strict=True) if its == node]
        assert len({len(share) for share in shares}) == 1
        assert all(share for share in shares)
        if len(shares) <= cores:
            assert len({core for share in shares for core in share}) == sum(map(len, shares))
            assert sum(map(len, shares)) > cores - len(shares)
