"""A rollout process is killed with 200 episodes in flight, half of them over: none is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from k2rl.config import Config
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.store.base import Counts, TrajectoryStore, open_store
from k2rl.types import Task
from tests.conftest import ROOT
from tests.rollouts.test_pool import Engine, Letters, Table, config_of

pytestmark = pytest.mark.slow

TASKS, GROUP, OVER = 25, 8, 100
FLYING = TASKS * GROUP

PROCESS = """
import asyncio, sys
from tests.rollouts.test_pool_killed import fly

asyncio.run(fly(*sys.argv[1:]))
"""


class Half(Engine):
    """Answers the first requests, and no others."""

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        self.requests.append(("", sampling))
        if len(self.requests) > OVER:
            await asyncio.Event().wait()
        return self._generation([self._letter, self._stop], "stop")


async def draw(step: int, number: int) -> list[Task]:
    return list(islice(Letters().tasks("train", 0), TASKS))


def seated(engine: type[Engine], store: TrajectoryStore) -> Table:
    chat = ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))
    return Table(settings(), engine(chat), chat, store, draw)  # type: ignore[arg-type]


def settings() -> Config:
    return config_of(tasks_per_step=TASKS, group_size=GROUP, oversample=1.0, max_concurrent=FLYING)


async def fly(url: str, name: str) -> None:
    """Play until it is killed; says so when all are in the air, and half of them down again."""
    table = seated(Half, open_store(url, name, 30.0))
    step = asyncio.ensure_future(table.step(1))
    while table.pool.played < OVER or len(table.engine.requests) < FLYING:
        assert not step.done()
        await asyncio.sleep(0.01)
    sys.stdout.write("flying\n")
    sys.stdout.flush()
    await step


@pytest.mark.parametrize("keeper", ["sqlite", "redis"])
def test_of_200_episodes_in_flight_none_is_lost_or_doubled(
    keeper: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue("redis_server").url if keeper == "redis" else str(tmp_path / "e.sqlite3")
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, url, "killed run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    assert process.stdout is not None
    assert process.stdout.readline() == "flying\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    async def resumed() -> Any:
        store = open_store(url, "killed run", 30.0)
        assert store.counts() == Counts(0, FLYING - OVER, OVER, 0)
        table = seated(Engine, store)
        harvest = await table.step(1)
        assert store.counts() == Counts(0, 0, 0, FLYING)
        await table.pool.close()
        return harvest, len(table.engine.requests)

    harvest, asked = asyncio.run(asyncio.wait_for(resumed(), 120))
    assert len({t.id for t in harvest.trajectories}) == len(harvest.trajectories) == FLYING
    assert not any(t.failed for t in harvest.trajectories)
    assert asked == FLYING - OVER, "what was over is not played again"
