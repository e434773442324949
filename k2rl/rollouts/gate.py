"""The engine as episodes see it: open while a step rolls out, closed while the trainer works."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from k2rl.inference.engine import Generation, InterruptibleEngine, Sampling

Pause = Literal["turn", "generation"]

#: How often what was on its way to the engine when it was interrupted is interrupted again.
INTERRUPT_INTERVAL_S = 0.2


class Gate:
    """An `InferenceEngine` whose requests wait while it is closed.

    At most `capacity` of them are with the engine at a time; the others wait here, where their deadlines have
    not begun, first come first served.
    """

    def __init__(self, engine: InterruptibleEngine, capacity: int) -> None:
        self._engine = engine
        self._places = asyncio.Semaphore(capacity)
        self._opened = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0
        self._closed_at = time.monotonic()
        self._closed_s = 0.0
        self._busy_since = 0.0
        self._busy_s = 0.0
        #: Sampled through it, ever.
        self.tokens = 0

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """See `InferenceEngine.generate`, once the gate is open."""
        while True:
            await self._opened.wait()
            async with self._places:
                if not self._opened.is_set():
                    continue
                self._begin()
                try:
                    generation = await self._engine.generate(prompt_ids, sampling)
                finally:
                    self._end()
            self.tokens += len(generation.token_ids)
            return generation

    def _begin(self) -> None:
        if self._running == 0:
            self._busy_since = time.monotonic()
            self._idle.clear()
        self._running += 1

    def _end(self) -> None:
        self._running -= 1
        if self._running == 0:
            self._busy_s += time.monotonic() - self._busy_since
            self._idle.set()

    def open(self) -> None:
        if not self._opened.is_set():
            self._closed_s += time.monotonic() - self._closed_at
            self._opened.set()

    async def close(self, pause: Pause) -> None:
        """Let nothing through any more, and wait until the engine is idle.

        With `turn` the requests that are there end as they would; with `generation` they are interrupted.
        """
        if self._opened.is_set():
            self._opened.clear()
            self._closed_at = time.monotonic()
        while self._running:
            if pause == "generation":
                await self._engine.interrupt()
            idle = asyncio.ensure_future(self._idle.wait())
            await asyncio.wait({idle}, timeout=INTERRUPT_INTERVAL_S)
            idle.cancel()

    def closed_s(self) -> float:
        """Seconds for which it has been closed, ever."""
        return self._closed_s + (0.0 if self._opened.is_set() else time.monotonic() - self._closed_at)

    def busy_s(self) -> float:
        """Seconds for which the engine has had at least one request, ever."""
        return self._busy_s + (time.monotonic() - self._busy_since if self._running else 0.0)
