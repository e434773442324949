"""What the driver makes of what a worker's calls come back with. No cluster: awaitables that raise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError

from k2rl.config import DeadlineConfig
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import EngineDeadError
from k2rl.workers.handle import EngineLostError, Worker, WorkerLostError


def remote(cause: Exception) -> Exception:
    """An actor method's exception as Ray raises it: an instance of its cause's class too."""
    return RayTaskError("policy_step", "traceback", cause).as_instanceof_cause()


async def raising(error: Exception) -> None:
    raise error


def outcome(error: Exception, tmp_path: Path) -> tuple[Exception, Worker]:
    worker = Worker(None, 0, tmp_path / "worker.log", DeadlineConfig())
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
        (
            remote(EngineDeadError("all\ngone")),
            "the vLLM engine of worker 0 died while training: all gone",
            False,
        ),
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
    assert message in str(raised)
    assert worker.lost == lost == isinstance(raised, WorkerLostError)
    assert isinstance(raised, EngineLostError) == ("vLLM engine" in message)


def test_wrong_input_found_by_the_worker_stays_wrong_input(tmp_path: Path) -> None:
    assert isinstance(outcome(remote(ConfigError("no such model")), tmp_path)[0], ConfigError)


@pytest.mark.parametrize("late_is_lost", [True, False])
def test_our_own_deadline_is_called_one(tmp_path: Path, late_is_lost: bool) -> None:
    async def call() -> None:
        await worker._await("training", asyncio.Event().wait(), 0, late_is_lost)

    worker = Worker(None, 0, tmp_path / "worker.log", DeadlineConfig())
    with pytest.raises(RunError, match="worker 0 hangs: training took more than 0 s"):
        asyncio.run(call())
    assert worker.lost == late_is_lost
