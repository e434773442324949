"""What the driver makes of what a worker's calls come back with. No cluster: awaitables that raise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError

from k2rl.config import ClusterConfig, DeadlineConfig
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import EngineDeadError
from k2rl.workers.handle import Worker, reservation


def remote(cause: Exception) -> Exception:
    """An actor method's exception as Ray raises it: an instance of its cause's class too."""
    return RayTaskError("policy_step", "traceback", cause).as_instanceof_cause()


async def raising(error: Exception) -> None:
    raise error


def outcome(error: Exception, tmp_path: Path) -> tuple[Exception, Worker]:
    worker = Worker(None, "worker 0", tmp_path / "worker.log", DeadlineConfig())
    with pytest.raises((RunError, ConfigError)) as caught:
        asyncio.run(worker._await("training", raising(error), 5))
    assert "\n" not in str(caught.value)
    return caught.value, worker


@pytest.mark.parametrize(
    ("error", "message", "lost"),
    [
        (remote(TimeoutError("the disk")), "failed while training: TimeoutError('the disk')", False),
        (remote(ValueError("no tokens")), "failed while training: ValueError('no tokens')", False),
        (remote(RunError("loss is nan")), "loss is nan", False),
        (remote(EngineDeadError("gone")), "the vLLM engine of worker 0 died while training", False),
        (ActorDiedError(), "worker 0 died while training", True),
        (
            OutOfMemoryError("node\nfull"),
            "worker 0 was lost while training: OutOfMemoryError: node full",
            True,
        ),
        (ObjectLostError("00" * 28, None, ""), "worker 0 was lost while training: ObjectLostError", True),
    ],
)
def test_every_failure_of_a_call_is_one_line(
    error: Exception, message: str, lost: bool, tmp_path: Path
) -> None:
    raised, worker = outcome(error, tmp_path)
    assert isinstance(raised, RunError)
    assert message in str(raised)
    assert worker.lost == lost


def test_wrong_input_found_by_the_worker_stays_wrong_input(tmp_path: Path) -> None:
    assert isinstance(outcome(remote(ConfigError("no such model")), tmp_path)[0], ConfigError)


@pytest.mark.parametrize("late_is_lost", [True, False])
def test_our_own_deadline_is_called_one(tmp_path: Path, late_is_lost: bool) -> None:
    async def call() -> None:
        await worker._await("training", asyncio.Event().wait(), 0, late_is_lost)

    worker = Worker(None, "worker 0", tmp_path / "worker.log", DeadlineConfig())
    with pytest.raises(RunError, match="worker 0 hangs: training took more than 0 s"):
        asyncio.run(call())
    assert worker.lost == late_is_lost


nodes = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(1, 64)}, optional={"GPU": st.integers(1, 8)}), min_size=1
)


@given(nodes, st.integers(0, 80), st.integers(0, 9))
def test_a_reservation_fits_on_one_node(nodes: list[dict[str, float]], cpus: int, gpus: int) -> None:
    config = ClusterConfig(cpus_per_worker=cpus, gpus_per_worker=float(gpus))
    fits = any(node["CPU"] >= max(1, cpus) and node.get("GPU", 0) >= gpus for node in nodes)
    if not fits:
        with pytest.raises(ConfigError, match=r"cluster\.[cg]pus_per_worker=\d+, but no .*node"):
            reservation(config, nodes)
        return
    reserved_cpus, reserved_gpus = reservation(config, nodes)
    assert reserved_gpus == gpus
    assert reserved_cpus == cpus or cpus == 0
    assert any(node["CPU"] >= reserved_cpus and node.get("GPU", 0) >= gpus for node in nodes)


def test_the_message_names_what_there_is() -> None:
    config = ClusterConfig(cpus_per_worker=64)
    with pytest.raises(
        ConfigError, match=r"cpus_per_worker=64, but no node of the Ray cluster has more than 8; 0 reserves"
    ):
        reservation(config, [{"CPU": 2.0}, {"CPU": 8.0}])
    with pytest.raises(
        ConfigError, match=r"gpus_per_worker=1, but no node of the Ray cluster has more than 0"
    ):
        reservation(ClusterConfig(gpus_per_worker=1), [{"CPU": 2.0}])
