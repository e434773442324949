"""Environments in processes of a Ray cluster: actors that serve them, wherever there are nodes."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util import get_node_ip_address

import envs.registry
from envs.base import TextEnv
from envs.service.remote import EnvironmentServiceError, RemoteEnv
from k2rl.config import Config
from k2rl.errors import RunError
from k2rl.serving.server import EnvironmentServer, ServiceOptions
from k2rl.workers.servers import addresses_of, end

TRIES = 3
"""To start a service in the place of one that died, after which its place stays empty."""
PAUSE_S = 1.0

logger = logging.getLogger(__name__)


class ServedEnvironment(msgspec.Struct, frozen=True):
    """What each service serves; see `EnvServiceConfig`."""

    id: str
    kwargs: dict[str, Any]
    episodes: int
    call_seconds: float


class EnvironmentActor:
    """A service of an environment, on its node's address, at a port that is free."""

    async def start(self, served: ServedEnvironment, token: str) -> str:
        """Returns the service's address."""
        options = ServiceOptions(
            host=get_node_ip_address(),
            token=token,
            capacity=served.episodes,
            call_seconds=served.call_seconds,
        )
        make = partial(envs.registry.make, served.id, **served.kwargs)
        self._server = EnvironmentServer(served.id, make, options)
        return await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()

    async def lives(self) -> None:
        """Never returns."""
        await asyncio.Event().wait()

    async def pid(self) -> int:
        return os.getpid()


class ClusterEnvironments:
    """The services of an environment in a cluster; each that dies is replaced, on any node that is there."""

    def __init__(self, served: ServedEnvironment, note: Callable[[str], None]) -> None:
        self._served, self._note = served, note
        self._token = secrets.token_urlsafe(32)
        #: Actor and address by number; of one that has died there is none.
        self._services: dict[int, tuple[Any, str]] = {}
        self._keeping: list[asyncio.Future[None]] = []

    @classmethod
    async def start(
        cls, served: ServedEnvironment, workers: int, note: Callable[[str], None]
    ) -> ClusterEnvironments:
        """Start them, dealt out over the nodes; Ray is initialised.

        Args:
            workers: how many.
            note: is told of deaths.

        Raises:
            RunError: one did not start, or not in time.
        """
        services = cls(served, note)
        services._services = dict(enumerate(await services._started(workers)))
        services._keeping = [asyncio.ensure_future(services._keep(number)) for number in range(workers)]
        return services

    async def _started(self, count: int) -> list[tuple[Any, str]]:
        # They reserve nothing: workers reserve all CPUs that there are, and use them while episodes wait.
        kind = ray.remote(EnvironmentActor).options(num_cpus=0, scheduling_strategy="SPREAD")
        actors = [kind.remote() for _ in range(count)]
        urls = await addresses_of(actors, "an environment service", self._served, self._token)
        return list(zip(actors, urls, strict=True))

    @property
    def urls(self) -> list[str]:
        """Of those that live."""
        return [url for _, url in self._services.values()]

    def make_env(self) -> TextEnv:
        """An environment that is played in the service that has most room.

        Raises:
            EnvironmentServiceError: there is none.
        """
        urls = self.urls
        if not urls:
            raise EnvironmentServiceError(f"all services of {self._served.id} in the cluster have died")
        return RemoteEnv(urls, self._token, call_seconds=self._served.call_seconds)

    async def _keep(self, number: int) -> None:
        while True:
            actor, _ = self._services[number]
            with suppress(RayError):
                await actor.lives.remote()
            del self._services[number]
            self._note(f"a service of {self._served.id} has died and is started again")
            for attempt in range(1, TRIES + 1):
                await asyncio.sleep(PAUSE_S)
                try:
                    (self._services[number],) = await self._started(1)
                    break
                except RunError as error:
                    logger.warning("attempt %d of %d to replace a service", attempt, TRIES, exc_info=error)
            else:
                self._note(f"it did not start: {len(self._services)} services of {self._served.id} are left")
                return

    async def close(self) -> None:
        """Close the environments that are open there, and the services."""
        for keeping in self._keeping:
            keeping.cancel()
        if self._keeping:
            await asyncio.wait(self._keeping)
        await end([actor for actor, _ in self._services.values()])


@asynccontextmanager
async def environments(
    config: Config, make_env: Callable[[], TextEnv], note: Callable[[str], None]
) -> AsyncIterator[Callable[[], TextEnv]]:
    """What makes the environments of episodes: `make_env`, or, if the configuration says so, services.

    Raises:
        RunError: a service did not start.
    """
    env, service = config.env, config.env.service
    if not service.workers or config.debug.mode == "train_only":
        yield make_env
        return
    served = ServedEnvironment(env.id, env.kwargs, service.episodes, service.call_seconds)
    services = await ClusterEnvironments.start(served, service.workers, note)
    try:
        yield services.make_env
    finally:
        await services.close()
