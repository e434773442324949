"""Replicas that die: their requests find another, or what takes its place. No Ray: workers that are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from k2rl.config import DeadlineConfig
from k2rl.errors import RunError
from k2rl.inference.engine import Generation, Sampling
from k2rl.tracking.restarts import read_restarts
from k2rl.workers.handle import EngineLostError, WorkerLostError
from k2rl.workers.pushing import Published
from k2rl.workers.recovery import Recovery
from k2rl.workers.replicas import Replicas

PROMPT = [1, 2, 3]
SAMPLING = Sampling(1.0, 4, 7)


class FakeWorker:
    """Answers with its version; dies of the requests, starts and joins that it is told to die of."""

    def __init__(self, rank: int) -> None:
        self.rank, self.name = rank, f"worker {rank}"
        self.version = 1
        self.dies_of: list[str] = []
        self.calls: list[str] = []
        #: Held up here, if it is told to be.
        self.gate = asyncio.Event()
        self.gate.set()

    async def call(self, what: str, method: str, deadline: str, *arguments: Any, **_: object) -> Any:
        self.calls.append(method)
        await self.gate.wait()
        await asyncio.sleep(0)
        if method in self.dies_of:
            self.dies_of.remove(method)
            raise self.engine_lost(f"died while {what}")
        if method == "generate":
            return Generation((5,), (-0.1,), ((0, self.version),), "stop")
        return 1 if method == "restart_engine" else None

    async def diagnosed(self, what: str) -> str:
        self.calls.append(f"diagnosed: {what}")
        return "\nwhat each part was doing"

    def engine_lost(self, what: str) -> EngineLostError:
        return EngineLostError(f"the vLLM engine of {self.name} {what}; last lines of a log:\nnothing")


class Scene:
    """Two replicas that serve version 1."""

    def __init__(self, run_dir: Path, restarts: int) -> None:
        self.workers = [FakeWorker(0), FakeWorker(2)]
        self.told: list[str] = []
        self.run_dir = run_dir
        recovery = Recovery(run_dir, restarts)
        recovery._tell = self.told.append
        self.join = Published(1, True, {}, "", {})
        self.deaths_in_join: list[int] = []
        self.replicas = Replicas(
            {worker.rank: worker for worker in self.workers},  # type: ignore[misc]
            DeadlineConfig(),
            recovery,
            self._bring_up,
        )
        self.replicas.admit(1)

    async def _bring_up(self, leader: int, receivers: int) -> Published:
        await asyncio.sleep(0)
        if leader in self.deaths_in_join:
            self.deaths_in_join.remove(leader)
            # The heartbeat knows of it before the join has failed.
            await self.replicas.look(leader, "it is gone", 0.0)
            return Published(1, True, {leader: "gone"}, "gone", {})
        return self.join

    async def generate(self) -> Generation:
        return await asyncio.wait_for(self.replicas.generate(PROMPT, SAMPLING), 20)

    def calls(self, method: str) -> list[int]:
        return [worker.calls.count(method) for worker in self.workers]


def play(tmp_path: Path, script: Callable[[Scene], Coroutine[Any, Any, None]], restarts: int = 5) -> None:
    async def scene() -> None:
        await script(Scene(tmp_path, restarts))

    asyncio.run(scene())


def test_a_request_of_a_dead_replica_is_given_to_another_at_once(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        first, other = scene.workers
        first.dies_of = ["generate"] * 2
        answers = await asyncio.gather(*(scene.generate() for _ in range(4)))
        assert all(answer.weight_spans == ((0, 1),) for answer in answers)
        assert other.calls == ["generate"] * 4
        await scene.replicas.settle()
        assert first.calls == ["generate"] * 2 + ["restart_engine"]
        assert scene.replicas.serving == [0, 2]
        assert [restart.why for restart in read_restarts(tmp_path)] == [
            "the vLLM engine of worker 0 died while generating"
        ]

    play(tmp_path, script)


def test_when_all_are_dead_requests_wait_for_one_that_is_back(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        for worker in scene.workers:
            worker.dies_of = ["generate"] * 3
        # Two deaths at a time, of which one is told of: 2 replicas x 3 deaths.
        answers = await asyncio.gather(*(scene.generate() for _ in range(6)))
        assert len(answers) == 6
        await scene.replicas.settle()
        assert len(read_restarts(tmp_path)) == sum(scene.calls("restart_engine"))

    play(tmp_path, script, restarts=6)


def test_a_death_is_counted_once_however_many_notice(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        first = scene.workers[0]
        first.gate.clear()
        for _ in range(3):
            await scene.replicas.look(0, "it is gone", 0.0)
        await scene.replicas.look(1, "", 0.0)  # leads no replica
        assert scene.replicas.serving == [2]
        first.gate.set()
        await scene.replicas.settle()
        assert scene.replicas.serving == [0, 2]
        assert scene.told == [
            "the vLLM engine of worker 0 died: it is gone; restart 1 of recovery.max_restarts=5"
        ]

    play(tmp_path, script)


def test_one_that_does_not_answer_is_given_up_first(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        limit = DeadlineConfig().heartbeat_s
        await scene.replicas.look(2, "", limit - 1)
        assert scene.workers[1].calls == []
        await scene.replicas.look(2, "", limit + 1)
        await scene.replicas.settle()
        # Before it is killed.
        calls = ["diagnosed: answering heartbeats", "give_up_engine", "restart_engine"]
        assert scene.workers[1].calls == calls
        assert "did not answer for 60 s" in scene.told[0]

    play(tmp_path, script)


def test_too_many_deaths_are_reported_as_the_last_one(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        for worker in scene.workers:
            worker.dies_of = ["generate"] * 9
        with pytest.raises(EngineLostError, match="the vLLM engine of worker . died while generating; last"):
            await scene.generate()
        assert len(read_restarts(tmp_path)) == 2

    play(tmp_path, script, restarts=2)


def test_a_start_that_fails_is_tried_again_and_counted(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.workers[0].dies_of = ["restart_engine"]
        await scene.replicas.look(0, "it is gone", 0.0)
        await scene.replicas.settle()
        assert scene.calls("restart_engine") == [2, 0]
        assert len(read_restarts(tmp_path)) == 2
        scene.workers[0].dies_of = ["restart_engine"] * 9
        await scene.replicas.look(0, "it is gone", 0.0)
        with pytest.raises(EngineLostError, match="died while starting"):
            await scene.replicas.settle()
        with pytest.raises(EngineLostError, match="died while starting"):
            scene.replicas.failed.result()

    play(tmp_path, script, restarts=4)


def test_those_that_die_asleep_are_started_for_the_next_push(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.replicas.fence()
        await scene.replicas.look(2, "it is gone", 0.0)
        assert scene.calls("restart_engine") == [0, 0]
        with pytest.raises(RunError, match="no vLLM serves"):
            await scene.generate()
        assert await scene.replicas.start_dead() == {2: 1}
        for worker in scene.workers:
            worker.version = 2
        scene.replicas.admit(2)
        assert scene.replicas.serving == [0, 2]
        assert (await scene.generate()).weight_spans == ((0, 2),)

    play(tmp_path, script)


def test_one_that_dies_of_a_push_is_brought_to_its_version(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.replicas.fence()
        scene.replicas.lose(0, scene.workers[0].engine_lost("died"))
        scene.join = Published(2, True, {}, "", {})
        scene.replicas.admit(2)
        assert scene.replicas.serving == [2]
        await scene.replicas.settle()
        assert scene.replicas.serving == [0, 2]

    play(tmp_path, script)


def test_one_that_dies_while_it_joins_is_started_once_more_and_counted_once(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.deaths_in_join = [2]
        await scene.replicas.look(2, "it is gone", 0.0)
        await scene.replicas.settle()
        assert scene.replicas.serving == [0, 2]
        assert scene.calls("restart_engine") == [0, 2]
        assert [why.why for why in read_restarts(tmp_path)][1:] == [
            "the vLLM engine of worker 2 died while being brought up to date: gone"
        ]

    play(tmp_path, script)


def test_one_that_cannot_be_brought_up_to_date_ends_the_group(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.join = Published(1, True, {}, "none is kept", {})
        for leader in (0, 2):
            await scene.replicas.look(leader, "it is gone", 0.0)
        with pytest.raises(WorkerLostError, match="could not be brought up to date: none is kept"):
            await scene.generate()

    play(tmp_path, script)


def test_an_answer_of_other_weights_is_refused(tmp_path: Path) -> None:
    async def script(scene: Scene) -> None:
        scene.workers[0].version = 0
        with pytest.raises(RunError, match=r"worker 0 answered with weights of version \[0\], but 1 was"):
            await scene.generate()

    play(tmp_path, script)
