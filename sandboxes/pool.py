"""Sandboxes that are open before anybody asks for one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sandboxes.base import Backend, Sandbox, SandboxSpec
from sandboxes.errors import SandboxClosedError, SandboxError


class SandboxPool:
    """Keeps some sandboxes of one spec open. Each is given out once and closed after use: one for each
    rollout.

    Args:
        backend: where they come from; it is not closed with the pool.
        spec: what each of them is.
        ready: how many wait.
    """

    def __init__(self, backend: Backend, spec: SandboxSpec, ready: int = 2) -> None:
        if ready < 0:
            raise ValueError(f"a pool cannot keep {ready} sandboxes ready")
        self._backend = backend
        self._spec = spec
        self._ready = ready
        self._opening: deque[asyncio.Task[Sandbox]] = deque()
        self._closed = False

    async def take(self) -> Sandbox:
        """A sandbox that nobody has used; whoever takes it closes it.

        Raises:
            SandboxError: as `Backend.open`.
            SandboxClosedError: the pool is closed.
        """
        while True:
            if self._closed:
                raise SandboxClosedError("the pool of sandboxes is closed")
            waiting = self._opening.popleft() if self._opening else asyncio.create_task(self._open())
            self.fill()
            try:
                sandbox = await waiting
            except asyncio.CancelledError:
                waiting.cancel()
                raise
            if await sandbox.is_alive():
                return sandbox
            await sandbox.close()  # it was killed while it waited

    def fill(self) -> None:
        """Begin to open what is missing."""
        while len(self._opening) < self._ready and not self._closed:
            self._opening.append(asyncio.create_task(self._open()))

    @asynccontextmanager
    async def sandbox(self) -> AsyncIterator[Sandbox]:
        """`take` one, and close it at the end."""
        sandbox = await self.take()
        try:
            yield sandbox
        finally:
            await sandbox.close()

    async def close(self) -> None:
        """Close the sandboxes that wait; those that were taken belong to their takers."""
        self._closed = True
        while self._opening:
            with suppress(SandboxError):  # one that could not be opened needs no closing
                await (await self._opening.popleft()).close()

    async def _open(self) -> Sandbox:
        return await self._backend.open(self._spec)
