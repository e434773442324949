"""The worker's own thread for the trainer."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.publisher import TrainerRank
from k2rl.checkpoint_engine.push import PushReport
from k2rl.checkpoint_engine.sender import Sender, TensorSource
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig, InferenceConfig, OptimizerConfig
from k2rl.inference.engine import EngineDeadError
from k2rl.models.hub import resolve_model
from k2rl.training.engine import compute_with
from k2rl.workers import colocated
from k2rl.workers.colocated import ColocatedWorker
from k2rl.workers.pushing import Published as PushOutcome
from k2rl.workers.spec import Place, WorkerSpec


class Published:
    """Takes what would be pushed."""

    def __init__(self) -> None:
        self.engines: dict[str, object] = {}
        self.coordinator = SimpleNamespace(version=None)

    async def publish(self, ranks: dict[int, TrainerRank], version: int) -> PushReport:
        self.coordinator.version = version
        return PushReport(version, ranks[0].manifest.nbytes, 1, 0.0, 0.0, 0.0)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ColocatedWorker:
    monkeypatch.setattr(colocated, "redirect_output", lambda path: None)
    spec = WorkerSpec(
        str(tmp_path),
        "float32",
        "cpu",
        (),
        0,
        str(tmp_path),
        OptimizerConfig(),
        64,
        2,
        InferenceConfig(),
        CheckpointEngineConfig(),
    )
    worker = ColocatedWorker(spec, 0)
    worker._place = Place(0, 1, "", "float32", 0, "", (0,), (0,))
    worker._places, worker._actors, worker._sender = [worker._place], [None], Sender(0)
    return worker


def test_the_trainer_keeps_its_thread_and_its_thread_count(worker: ColocatedWorker) -> None:
    """OpenMP's count belongs to the thread that set it; vLLM sets it to 1 in others."""

    async def counts() -> list[tuple[int, int]]:
        def now() -> tuple[int, int]:
            return threading.get_ident(), torch.get_num_threads()

        await worker._train(compute_with, 2)
        await asyncio.to_thread(torch.set_num_threads, 1)
        return list(await asyncio.gather(*(worker._train(now) for _ in range(8))))

    threads = torch.get_num_threads()
    try:
        found = asyncio.run(counts())
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1
    assert found[0][1] == 2
    assert found[0][0] != threading.get_ident()


def test_versions_count_the_optimizer_steps(worker: ColocatedWorker) -> None:
    """So they go on where a resumed trainer does."""
    publisher, trainer = Published(), SimpleNamespace(step_count=0)
    trainer.weights_source = lambda: TensorSource([("weight", torch.ones(3))], 0)
    worker_with_parts: Any = worker
    worker_with_parts._publisher, worker_with_parts._trainer = publisher, trainer

    async def publish(step_count: int) -> PushOutcome:
        trainer.step_count = step_count
        return await worker.publish({})

    for count in (7, 8):
        published = asyncio.run(publish(count))
        assert (published.version, published.metrics["version"]) == (count, count)
        assert published.committed
        assert not published.lost


def test_what_a_push_has_cost_is_told_and_not_raised(worker: ColocatedWorker) -> None:
    class Losing(Published):
        async def publish(self, ranks: dict[int, TrainerRank], version: int) -> PushReport:
            del self.engines["vLLM of worker 2"]
            raise EngineDeadError("vLLM of worker 2: gone")

    class Failing(Published):
        async def publish(self, ranks: dict[int, TrainerRank], version: int) -> PushReport:
            raise PushError("a receiver is out of luck")

    worker_with_parts: Any = worker
    worker._spec = msgspec.structs.replace(
        worker._spec, model_path=str(resolve_model("tiny-qwen3")), trains=False
    )
    worker_with_parts._publisher = losing = Losing()
    losing.engines = {"vLLM of worker 0": None, "vLLM of worker 2": None}
    published = asyncio.run(worker.publish({}))
    assert (published.committed, published.lost) == (False, {2: "vLLM of worker 2: gone"})
    worker_with_parts._publisher = Failing()
    published = asyncio.run(worker.publish({}))
    assert (published.committed, published.lost) == (False, {})
    assert published.error == "a receiver is out of luck"


def test_a_checkpoint_that_is_served_is_closed_once_it_is_pushed(worker: ColocatedWorker) -> None:
    folder = resolve_model("tiny-qwen3")
    file = (folder / "model.safetensors").resolve()

    def is_open() -> bool:
        return file in [Path(f"/proc/self/fd/{fd.name}").resolve() for fd in Path("/proc/self/fd").iterdir()]

    class Reading(Published):
        async def publish(self, ranks: dict[int, TrainerRank], version: int) -> PushReport:
            plan = plan_push(ranks[0].manifest, (0,), bucket_bytes=1 << 20)
            assert await ranks[0].changes(plan, -1, version), "all of it is read"
            assert is_open()
            return await super().publish(ranks, version)

    worker._spec = msgspec.structs.replace(worker._spec, model_path=str(folder), trains=False)
    worker_with_parts: Any = worker
    worker_with_parts._publisher = Reading()
    assert asyncio.run(worker.publish({})).version == 0
    assert not is_open()
