"""The start of Ray on a machine that has other work."""

from __future__ import annotations

from typing import Any

import pytest

from k2rl.config import ClusterConfig
from k2rl.errors import RunError
from k2rl.workers import cluster


class Late:
    """Ray, which is in time at its `nth` start."""

    def __init__(self, nth: int) -> None:
        self.nth, self.starts, self.ends = nth, 0, 0

    def init(self, **_: Any) -> None:
        self.starts += 1
        if self.starts < self.nth:
            raise Exception("The current node timed out during startup. This could happen because …")

    def shutdown(self) -> None:
        self.ends += 1


def test_a_node_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Late(cluster.STARTS)
    monkeypatch.setattr(cluster, "ray", late)
    with cluster.ray_cluster(ClusterConfig()):
        assert late.starts == cluster.STARTS
    assert late.ends == cluster.STARTS


def test_a_machine_without_time_for_ray_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ray", Late(cluster.STARTS + 1))
    with (
        pytest.raises(RunError, match="Ray did not start on this machine in 3 tries"),
        cluster.ray_cluster(ClusterConfig()),
    ):
        pass


def test_what_else_goes_wrong_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Late):
        def init(self, **_: Any) -> None:
            self.starts += 1
            raise ValueError("something else")

    broken = Broken(1)
    monkeypatch.setattr(cluster, "ray", broken)
    with pytest.raises(ValueError, match="something else"), cluster.ray_cluster(ClusterConfig()):
        pass
    assert broken.starts == 1
