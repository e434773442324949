"""All workers as one: whose failure is told, and what is done about a failed push. No Ray: told workers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from k2rl.config import Config
from k2rl.errors import ConfigError, RunError
from k2rl.tracking.restarts import read_restarts
from k2rl.workers import group
from k2rl.workers.group import WorkerGroup, combined
from k2rl.workers.handle import EngineLostError, WorkerLostError
from k2rl.workers.pushing import Published
from k2rl.workers.recovery import Recovery

Script = Callable[[WorkerGroup, "list[FakeWorker]"], Coroutine[Any, Any, None]]


class FakeWorker:
    """Gives the answers it is told to give to a method, one after the other; then its rank, or nothing."""

    def __init__(self, rank: int) -> None:
        self.rank, self.name, self.actor = rank, f"worker {rank}", None
        self.answers: defaultdict[str, list[Any]] = defaultdict(list)
        self.calls: list[str] = []

    async def call(self, what: str, method: str, deadline: str, *arguments: Any, **_: object) -> Any:
        self.calls.append(method)
        await asyncio.sleep(0)
        answer = self.answers[method].pop(0) if self.answers[method] else {}
        if isinstance(answer, BaseException):
            raise answer
        if answer is forever:
            await asyncio.Event().wait()
        return answer

    async def heartbeat(self) -> tuple[str, float]:
        answer: tuple[str, float] = await self.call("", "heartbeat", "")
        return answer or ("", 0.0)

    def engine_lost(self, what: str) -> EngineLostError:
        return EngineLostError(f"the vLLM engine of {self.name} {what}")


forever = object()


def committed(version: int, lost: dict[int, str] | None = None) -> Published:
    return Published(version, True, lost or {}, "", {"version": float(version), "bytes": 5.0})


def failed(error: str, lost: dict[int, str] | None = None) -> Published:
    return Published(1, False, lost or {}, error, {})


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(group.ray, "put", lambda argument: argument)
    monkeypatch.setattr(group, "GRACE_S", 0.2)

    def play(script: Script, restarts: int = 5, heartbeat_s: float = 0.2) -> None:
        async def scene() -> None:
            config = Config()
            config.deadlines.heartbeat_s = heartbeat_s
            workers = [FakeWorker(rank) for rank in range(2)]
            recovery = Recovery(tmp_path, restarts)
            await script(WorkerGroup(workers, config, recovery), workers)  # type: ignore[arg-type]

        asyncio.run(scene())

    return play


def test_answers_come_by_rank(play: Callable[..., None]) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[0].answers["sft_step"] = [{"loss": 0.5, "memory/a_gib": 1.0, "memory/b_s": 1.0}]
        parts[1].answers["sft_step"] = [{"loss": 0.5, "memory/a_gib": 2.0, "memory/b_s": 0.5}]
        assert await workers.sft_step([], 1e-4) == {"loss": 0.5, "memory/a_gib": 3.0, "memory/b_s": 1.0}

    play(script)


def test_metrics_of_one_that_has_no_vllm_are_no_less() -> None:
    assert combined([{"memory/x_gib": 1.0}, {}]) == {"memory/x_gib": 1.0}
    assert combined([{}, {"memory/x_gib": 1.0, "loss": 2.0}]) == {"memory/x_gib": 1.0, "loss": 2.0}


@pytest.mark.parametrize("known_at_once", [True, False])
def test_a_death_is_told_before_what_comes_of_it(play: Callable[..., None], known_at_once: bool) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        death = WorkerLostError("worker 1 died while warm start")
        parts[0].answers["sft_step"] = [RunError("worker 0 failed: connection closed by peer")]
        if known_at_once:
            parts[1].answers["sft_step"] = [death]
        else:
            parts[1].answers["sft_step"] = [forever]
            parts[1].answers["heartbeat"] = [death]
        with pytest.raises(WorkerLostError, match="worker 1 died"):
            await workers.sft_step([], 1e-4)
        assert workers.lost

    play(script)


def test_what_fails_for_all_leaves_them_where_they_are(play: Callable[..., None]) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        for part in parts:
            part.answers["sft_step"] = [RunError("loss is nan")]
            part.answers["load"] = [ConfigError("of another model")]
        with pytest.raises(RunError, match="loss is nan"):
            await workers.sft_step([], 1e-4)
        with pytest.raises(ConfigError, match="of another model"):
            await workers.load(Path())
        assert not workers.lost

    play(script)


def test_one_that_hangs_when_others_have_failed_is_lost(play: Callable[..., None]) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[0].answers["sft_step"] = [RunError("rank 1 does not come")]
        parts[1].answers["sft_step"] = [forever]
        with pytest.raises(WorkerLostError, match="worker 1 hangs, after rank 1 does not come"):
            await workers.sft_step([], 1e-4)
        assert workers.lost

    play(script)


def test_a_vllm_that_dies_of_a_push_gets_the_same_push_again(
    play: Callable[..., None], tmp_path: Path
) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[0].answers["publish"] = [failed("gone", {1: "gone"}), committed(1)]
        parts[1].answers["restart_engine"] = [1]
        assert (await workers.publish())["bytes"] == 5.0
        assert parts[1].calls.count("restart_engine") == 1
        assert workers._replicas.serving == [0, 1]
        (restart,) = read_restarts(tmp_path)
        assert restart.why == "the vLLM engine of worker 1 died while publishing weights: gone"

    play(script)


def test_one_that_dies_after_the_commit_joins_it_while_others_serve(play: Callable[..., None]) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[0].answers["publish"] = [committed(1, {1: "gone"})]
        parts[0].answers["bring_up"] = [committed(1)]
        parts[1].answers["restart_engine"] = [1]
        await workers.publish()
        assert workers._replicas.serving == [0]
        await workers._replicas.settle()
        assert workers._replicas.serving == [0, 1]

    play(script)


def test_a_vllm_that_died_in_the_trainers_turn_is_started_before_the_push(play: Callable[..., None]) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[1].answers["heartbeat"] = [("its process ended", 0.0)]
        parts[1].answers["restart_engine"] = [1]
        parts[0].answers["publish"] = [committed(1)]
        await workers.publish()
        assert parts[1].calls.index("begin_serving") < parts[1].calls.index("restart_engine")
        assert workers._replicas.serving == [0, 1]

    play(script)


def test_a_push_that_fails_though_all_live_is_made_again_and_counted(
    play: Callable[..., None], tmp_path: Path
) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[0].answers["publish"] = [failed("out of luck")] * 3
        with pytest.raises(RunError, match="publishing weights failed: out of luck"):
            await workers.publish()
        assert len(read_restarts(tmp_path)) == 2

    play(script, restarts=2)


def test_a_trainer_that_dies_in_a_push_is_the_reason(play: Callable[..., None]) -> None:
    async def script(workers: WorkerGroup, parts: list[FakeWorker]) -> None:
        parts[0].answers["publish"] = [failed("sender 1 died")]
        parts[1].answers["heartbeat"] = [("", 0.0), WorkerLostError("worker 1 died")]
        with pytest.raises(WorkerLostError, match="worker 1 died"):
            await workers.publish()
        assert workers.lost

    play(script)
