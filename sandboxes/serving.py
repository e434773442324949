"""`k2rl sandbox serve`: one backend behind HTTP, until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from sandboxes import registry
from sandboxes.errors import SandboxUnavailableError
from sandboxes.server import SandboxServer, ServerOptions


async def serve(backend: str, options: ServerOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then close every sandbox.

    Args:
        backend: its name.
        say: gets a line once the server listens, with its address.

    Raises:
        OSError: the address cannot be bound.
        SandboxUnavailableError: the backend does not work on this machine.
    """
    made = registry.create(backend)
    server = SandboxServer(made, options)
    try:
        missing = [one for one in await made.findings() if one.state == "missing"]
        if missing:
            why = "; ".join(f"{one.what}: {one.detail} ({one.mend})".replace(" ()", "") for one in missing)
            raise SandboxUnavailableError(f"the {backend} backend does not work here: {why}")
        ended = ended_by_signal()
        say(f"{backend} sandboxes at {await server.start()}")
        await ended.wait()
    finally:
        await server.stop()


def ended_by_signal() -> asyncio.Event:
    """Set at SIGINT or SIGTERM."""
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    return ended
