"""A worker's vLLM: started, asked whether it answers, given up, and started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from k2rl.checkpoint_engine.messages import Address
from k2rl.checkpoint_engine.plan import Needs
from k2rl.inference.engine import EngineDeadError

if TYPE_CHECKING:
    from k2rl.inference.vllm import VLLMEngine

#: How often it is asked.
INTERVAL_S = 2.0


class HostedEngine:
    """Outlives the engines in it; a `ReceivingEngine` for the publisher."""

    def __init__(self, configure: Callable[[], Awaitable[VLLMEngine]], host: int) -> None:
        """
        Args:
            configure: makes an engine that is not started yet.
            host: number of the host that it is on.
        """
        self._configure = configure
        self.host = host
        self._engine: VLLMEngine | None = None
        self._died = "it has not been started"
        self._asking: asyncio.Future[None] | None = None
        self._asked: float | None = None

    async def start(self, configured: VLLMEngine | None = None) -> None:
        """Start a new engine, after what is left of the last one was removed.

        Raises:
            EngineDeadError: vLLM could not start; its reason is in the log.
        """
        await self.shutdown()
        self._died, self._asked = "", None
        try:
            engine = configured or await self._configure()
            engine.host = self.host
            self._engine = await asyncio.to_thread(engine.start)
        except EngineDeadError as error:
            self._died = str(error)
            raise
        self._asking = asyncio.ensure_future(self._ask())

    @property
    def engine(self) -> VLLMEngine:
        """Raises:
        EngineDeadError: it has died.
        """
        if self._engine is None or self._died:
            raise EngineDeadError(self._died or "it is being started")
        return self._engine

    @property
    def died(self) -> str:
        """Why it is dead; empty if it lives, or is being started."""
        return self._died

    @property
    def silent_s(self) -> float:
        """For how long it has owed an answer; pushes, in which it gives none, have their own deadlines."""
        if self._engine is None or self._died or self._asked is None:
            return 0.0
        since = self._engine.pushed_until
        return 0.0 if since is None else time.monotonic() - max(self._asked, since)

    async def give_up(self, why: str) -> None:
        """Kill its processes, also if they stand still; whatever waits for it learns that it has died."""
        self._died = self._died or why
        if self._engine is not None:
            await asyncio.to_thread(self._engine.kill)

    async def shutdown(self) -> None:
        """Stop it, and leave nothing of it."""
        if self._asking is not None:
            self._asking.cancel()
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    async def _ask(self) -> None:
        while not self._died:
            if self.engine.pushed_until is not None:
                self._asked = time.monotonic()
                try:
                    await self.engine.answer()
                except EngineDeadError as error:
                    await self.give_up(str(error))
                self._asked = None
            await asyncio.sleep(INTERVAL_S)

    @property
    def num_receivers(self) -> int:
        return self.engine.num_receivers

    @property
    def needs(self) -> Sequence[Needs] | None:
        return self.engine.needs

    async def join_push(self, address: Address, version: int, deadline_s: float, first_receiver: int) -> None:
        await self.engine.join_push(address, version, deadline_s, first_receiver)

    async def push_ended(self) -> None:
        await self.engine.push_ended()

    async def push_settled(self) -> BaseException | None:
        """See `ReceivingEngine`; one that is as good as dead is given up."""
        try:
            outcome = await self.engine.push_settled()
        except EngineDeadError as error:
            outcome = error
        if isinstance(outcome, EngineDeadError):
            await self.give_up(str(outcome))
        return outcome
