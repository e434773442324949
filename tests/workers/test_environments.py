"""Environments in a Ray cluster, here of one node: played there, and replaced when they die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence

import pytest
import ray

from k2rl.config import Config
from k2rl.errors import RunError
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.types import Task, Trajectory
from k2rl.workers.environments import ClusterEnvironments, ServedEnvironment
from tests.envs.served_envs import Moody

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("ray")]

MOODY = ServedEnvironment("tests.envs.served_envs:Moody", {"greeting": "Hm?"}, 16, 20.0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 1024**2)
    yield
    ray.shutdown()


class Policy:
    """Says hello, and at the next turn `end`; at its 20th turn it kills a process, if it is given one."""

    def __init__(self, chat: ChatTemplate, doomed: int | None = None) -> None:
        self._chat, self._doomed = chat, doomed
        self._asked, self._killed = 0, asyncio.Event()

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        if self._doomed is not None:
            self._asked += 1
            if self._asked == 20:
                os.kill(self._doomed, signal.SIGKILL)
                self._killed.set()
            await self._killed.wait()
        said = "end" if "You said" in self._chat.decode(prompt_ids) else "hello"
        ids = tuple(self._chat.turn_ids(said))
        return Generation(ids, (0.0,) * len(ids), ((0, 0),), "stop")


async def played(services: ClusterEnvironments, policy: Policy, chat: ChatTemplate) -> Sequence[Trajectory]:
    """Twenty episodes at once."""
    scheduler = RolloutScheduler(Config(), policy, chat, services.make_env, Moody().rubric)
    tasks = [Task(f"t{number}", "moody", "calm", "train", number) for number in range(20)]
    return await scheduler.run([Attempt(f"a{task.seed}", "g", task, 1.0, task.seed) for task in tasks])


def test_episodes_are_played_there_and_a_service_that_dies_is_replaced() -> None:
    chat = ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))
    notes: list[str] = []

    async def scenario() -> None:
        services = await ClusterEnvironments.start(MOODY, 2, notes.append)
        before = services.urls
        assert len(set(before)) == 2
        trajectories = await played(services, Policy(chat), chat)
        assert [t.messages[0].content for t in trajectories] == [f"Hm? t{n}" for n in range(20)]
        assert {(t.failed, t.reward) for t in trajectories} == {(False, 0.5)}

        pid = await services._services[0][0].pid.remote()
        trajectories = await played(services, Policy(chat, pid), chat)
        failed = [t for t in trajectories if t.failed]
        assert 1 <= len(failed) <= 16, "those that it played"
        assert {t.reward for t in trajectories if not t.failed} == {0.5}

        while len(services.urls) < 2:
            await asyncio.sleep(0.1)
        assert len({*before, *services.urls}) == 3
        assert notes == [f"a service of {MOODY.id} has died and is started again"]
        assert not any(t.failed for t in await played(services, Policy(chat), chat))
        await services.close()

    asyncio.run(asyncio.wait_for(scenario(), 240))


def test_an_environment_that_cannot_be_made_there() -> None:
    async def scenario() -> None:
        served = ServedEnvironment("tests.envs.served_envs:Absent", {}, 1, 1.0)
        with pytest.raises(RunError, match=r"(?s)an environment service .* did not start.*Absent"):
            await ClusterEnvironments.start(served, 1, print)

    asyncio.run(asyncio.wait_for(scenario(), 240))
