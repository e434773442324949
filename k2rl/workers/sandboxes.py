"""Sandboxes on every node of a Ray cluster: an actor a node that serves them, and the backend that uses them
all."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray.util import get_node_ip_address
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from k2rl.workers.servers import addresses_of, end
from sandboxes import registry
from sandboxes.remote import RemoteBackend
from sandboxes.server import SandboxServer, ServerOptions


class ServedSandboxes(msgspec.Struct, frozen=True):
    """What each node serves."""

    #: Name of the backend, and its options.
    backend: str = "bubblewrap"
    options: dict[str, Any] = {}
    #: Most that are open at once on a node.
    sandboxes: int = 64
    #: Seconds after which a silent driver's sandboxes are closed.
    lease: float = 60.0


class NodeServer:
    """The actor: a sandbox server on its node's address, at a port that is free."""

    async def start(self, served: ServedSandboxes, token: str) -> str:
        """Returns the server's address."""
        options = ServerOptions(
            host=get_node_ip_address(), token=token, capacity=served.sandboxes, lease=served.lease
        )
        self._server = SandboxServer(registry.create(served.backend, **served.options), options)
        return await self._server.start()

    async def stop(self) -> None:
        await self._server.stop()


class ClusterSandboxes:
    """The servers of a cluster; `backend()` opens sandboxes where there is most room."""

    def __init__(self, actors: Sequence[Any], urls: Sequence[str], token: str) -> None:
        self._actors, self._token = actors, token
        self.urls = urls

    @classmethod
    async def start(cls, served: ServedSandboxes) -> ClusterSandboxes:
        """Start a server on every node that is alive; Ray is initialised.

        Raises:
            RunError: one did not start, or not in time.
        """
        token = secrets.token_urlsafe(32)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        kind = ray.remote(NodeServer)
        actors = [
            # They compute nothing: what runs in sandboxes is bounded by the sandboxes.
            kind.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote()
            for node in nodes
        ]
        return cls(actors, await addresses_of(actors, "a sandbox server", served, token), token)

    def backend(self) -> RemoteBackend:
        """A backend for the event loop that asks for it."""
        return RemoteBackend(self.urls, token=self._token)

    async def close(self) -> None:
        """Close what is open on the nodes, and the actors."""
        await end(self._actors)
