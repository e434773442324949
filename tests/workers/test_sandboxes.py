"""Sandboxes of a Ray cluster, here of one node."""

from __future__ import annotations

import asyncio

import pytest
import ray

from k2rl.errors import RunError
from k2rl.workers.sandboxes import ClusterSandboxes, ServedSandboxes
from sandboxes.base import SandboxSpec
from sandboxes.errors import SandboxError, SandboxUnavailableError

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 1024**2)
    yield
    ray.shutdown()


def test_sandboxes_of_the_nodes_and_the_death_of_one():
    async def scenario():
        served = await ClusterSandboxes.start(ServedSandboxes(lease=2.0))
        assert len(served.urls) == len(ray.nodes()) == 1
        backend = served.backend()
        sandbox = await backend.open(SandboxSpec())
        assert (await sandbox.run_python("print(6 * 7)")).text == "42\n"
        running = asyncio.create_task(sandbox.exec(["sleep", "1000"], timeout=1000))
        assert (await sandbox.exec(["true"])).ok
        ray.kill(served._actors[0])
        with pytest.raises(SandboxError, match=served.urls[0]):
            await running
        with pytest.raises(SandboxUnavailableError, match=served.urls[0]):
            await backend.open(SandboxSpec())
        await backend.close()
        await served.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_backend_that_does_not_work_there():
    async def scenario():
        with pytest.raises(RunError, match="no sandbox backend 'none'"):
            await ClusterSandboxes.start(ServedSandboxes(backend="none"))

    asyncio.run(asyncio.wait_for(scenario(), 120))
