"""A publisher whose ranks, engines and host agents are Ray actors: nothing but values goes between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from k2rl.checkpoint_engine.messages import AGENT, SENDER, Peer
from k2rl.checkpoint_engine.publisher import Publisher, TrainerRank
from k2rl.checkpoint_engine.transaction import PushError
from k2rl.config import CheckpointEngineConfig
from k2rl.inference.engine import EngineDeadError
from tests.integration.ray_parts import EXPECTED, AgentActor, RankActor, RemoteEngine, start

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=10**8)
    yield
    ray.shutdown()


def test_pushes_between_actors_on_two_hosts(cluster: None) -> None:
    """A killed actor of each kind is named, and what replaces it is reached again."""

    async def test() -> None:
        actors = [start(RankActor, 0, 0), start(RankActor, 1, 1)]
        manifests = await asyncio.gather(*(actor.manifest.remote() for actor in actors))
        agents = {host: start(AgentActor, host) for host in (0, 1)}

        def calls() -> dict[int, Any]:
            return {host: agent.take_part.remote for host, agent in agents.items()}

        def ranks() -> dict[int, TrainerRank]:
            return {
                number: TrainerRank(manifest, actor.send.remote, actor.changes.remote, number)
                for number, (actor, manifest) in enumerate(zip(actors, manifests, strict=True))
            }

        async def push(version: int) -> None:
            await asyncio.gather(*(actor.train.remote(version) for actor in actors))
            await publisher.publish(ranks(), version)

        async def hold(version: int) -> None:
            for engine in publisher.engines.values():
                assert isinstance(engine, RemoteEngine)
                assert await engine.actor.holds.remote() == (version, [version, version])

        engines = {name: RemoteEngine(host) for host, name in enumerate(("first", "second"))}
        config = CheckpointEngineConfig(strategy="delta")
        publisher = Publisher(engines, config, EXPECTED, calls(), listen="127.0.0.1")
        await publisher.start()
        parts = (*actors, *agents.values(), *(engine.actor for engine in engines.values()))
        await asyncio.gather(*(part.started.remote() for part in parts))
        for version in (1, 2):
            await push(version)
            await hold(version)

        ray.kill(engines["second"].actor)
        with pytest.raises(EngineDeadError, match="^second: its actor died"):
            await push(3)
        # It may hold parts of what failed: it goes back.
        await publisher.join("first", publisher.engines["first"])
        for host in (1, 0):
            fresh = RemoteEngine(host)
            await fresh.actor.started.remote()
            await publisher.join("second", fresh)
            await hold(2)
        await push(3)
        await hold(3)

        ray.kill(agents[1])
        with pytest.raises(PushError, match="host agent 1 .*died") as caught:
            await push(4)
        assert caught.value.culprit == Peer(AGENT, 1)
        agents[1] = start(AgentActor, 1)
        await agents[1].started.remote()
        publisher.agents.update(calls())
        await push(4)
        await hold(4)

        ray.kill(actors[1])
        with pytest.raises(PushError, match="trainer rank 1 failed: .*died") as caught:
            await publisher.publish(ranks(), 5)
        assert caught.value.culprit == Peer(SENDER, 1)
        actors[1] = start(RankActor, 1, 1)
        await actors[1].started.remote()
        await push(5)
        await hold(5)
        await publisher.close()

    asyncio.run(asyncio.wait_for(test(), 120))
