"""The inference replicas as the driver sees them: requests find one that serves, what dies is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from k2rl.config import DeadlineConfig
from k2rl.errors import RunError
from k2rl.inference.engine import Generation, Sampling
from k2rl.inference.router import Router
from k2rl.types import NO_WEIGHT_VERSION
from k2rl.workers.handle import EngineLostError, Worker, WorkerLostError
from k2rl.workers.pushing import Published
from k2rl.workers.recovery import Recovery

#: `down`: dead, and nobody sees to it yet.
State = Literal["up", "down", "starting"]

#: Brings the committed version into the vLLM that a worker leads, with so many workers.
BringUp = Callable[[int, int], Awaitable[Published]]


class Replicas:
    """The vLLMs of a group, each named by the rank of the worker that leads it."""

    def __init__(
        self,
        leaders: Mapping[int, Worker],
        deadlines: DeadlineConfig,
        recovery: Recovery,
        bring_up: BringUp,
    ) -> None:
        """They have been started, and serve nothing yet."""
        self._leaders = dict(leaders)
        self._deadlines = deadlines
        self._recovery = recovery
        self._bring_up = bring_up
        self._ranks = list(leaders)
        self._router = Router(len(self._ranks))
        self._state: dict[int, State] = dict.fromkeys(leaders, "up")
        #: What all of them serve that do; None: no one shall.
        self._version: int | None = None
        self._served = NO_WEIGHT_VERSION
        self._restarts: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        #: Fails if one cannot be brought back.
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def serving(self) -> list[int]:
        return [self._ranks[replica] for replica in self._router.serving]

    @property
    def version(self) -> int:
        """Of the weights that are served, or were last."""
        return self._served

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Sample one turn from a replica that serves; if that dies, from another, or from what replaces it.

        Raises:
            RunError: no one shall serve, or one answers with other weights than were published.
            EngineLostError: one died, and has done so too often.
        """
        while True:
            replica = await self._replica_for(prompt_ids)
            try:
                return await self.generate_at(self._ranks[replica], prompt_ids, sampling)
            except EngineLostError as error:
                self.lose(self._ranks[replica], error)
            finally:
                self._router.end(replica)

    async def generate_at(self, leader: int, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Sample from this one."""
        version = self._router.version(self._ranks.index(leader))
        worker = self._leaders[leader]
        arguments = (prompt_ids, sampling)
        generation: Generation = await worker.call(
            # vLLM that is slow leaves the trainer able to save.
            *("generating", "generate", "generate_s", *arguments),
            late_is_lost=False,
        )
        sampled = [version for _, version in generation.weight_spans]
        if not sampled and generation.finish_reason == "interrupted":
            return generation
        # A request that outlives a push has tokens of both versions, in their order.
        if version is None or not sampled or sampled[0] < version or sampled[-1] != self._version:
            raise RunError(
                f"{worker.name} answered with weights of version {sampled}, but {self._version} was published"
            )
        return generation

    async def interrupt(self) -> None:
        """Break off what all that serve are generating; one that dies of it is seen to by those who wait."""
        for leader in self.serving:
            with suppress(EngineLostError):
                await self._leaders[leader].call("breaking off requests", "interrupt", "heartbeat_s")

    async def _replica_for(self, prompt_ids: Sequence[int]) -> int:
        """Wait until one serves: what is started again has its own deadlines."""
        while (replica := self._router.begin(prompt_ids)) is None:
            if self.failed.done():
                self.failed.result()
            if self._version is None:
                raise RunError("no vLLM serves: no weights have been published since they were trained")
            await self._changed.wait()
        return replica

    def fence(self) -> None:
        """No one serves until weights are published."""
        self._version = None
        for replica in self._router.serving:
            self._router.fence(replica)

    def admit(self, version: int) -> None:
        """All that live serve this version; those that died of its push are brought back to it."""
        self._version = self._served = version
        for replica, leader in enumerate(self._ranks):
            if self._state[leader] == "up":
                self._router.admit(replica, version)
            elif self._state[leader] == "down":
                self._begin_restart(leader)
        self._tell()

    def lose(self, leader: int, error: EngineLostError) -> None:
        """One is dead; whoever finds it says so.

        Raises:
            EngineLostError: it may not be started again.
        """
        if self._state[leader] != "up":
            return
        self._router.fence(self._ranks.index(leader))
        self._recovery.spend(error)
        self._state[leader] = "down"
        if self._version is not None:
            self._begin_restart(leader)

    def _begin_restart(self, leader: int) -> None:
        task = asyncio.ensure_future(self._bring_back(leader))
        self._restarts.add(task)
        task.add_done_callback(self._brought_back)

    def _brought_back(self, task: asyncio.Task[None]) -> None:
        self._restarts.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)
        self._tell()

    async def _bring_back(self, leader: int) -> None:
        """Start a dead one again, with the version that the others serve."""
        while self._state[leader] != "up":
            receivers = await self.start_again(leader)
            joined = await self._bring_up(leader, receivers)
            worker = self._leaders[leader]
            if joined.lost:
                why = f"died while being brought up to date: {joined.error}"
                self.lose_again(leader, worker.engine_lost(why))
            elif joined.error or joined.version != self._version:
                raise WorkerLostError(
                    f"the vLLM engine of {worker.name} could not be brought up to date: {joined.error}"
                )
            else:
                self._state[leader] = "up"
        self._router.admit(self._ranks.index(leader), joined.version)

    def lose_again(self, leader: int, error: EngineLostError) -> None:
        """As `lose`, of one that its caller sees to."""
        self._recovery.spend(error)
        self._state[leader] = "down"

    async def start_again(self, leader: int) -> int:
        """Start a dead one, with random weights, until that succeeds; returns the number of its workers.

        Its caller sees to it until it is `up`.

        Raises:
            EngineLostError: it failed too often.
            WorkerLostError: its worker died.
        """
        while True:
            self._state[leader] = "starting"
            try:
                receivers: int = await self._leaders[leader].call("starting", "restart_engine", "start_s")
            except EngineLostError as error:
                self.lose_again(leader, error)
                continue
            return receivers

    async def start_dead(self) -> dict[int, int]:
        """Start all that are dead again, for a push; the numbers of their workers."""
        dead = [leader for leader, state in self._state.items() if state == "down"]
        receivers = await asyncio.gather(*map(self.start_again, dead))
        self._state |= dict.fromkeys(dead, "up")
        return dict(zip(dead, receivers, strict=True))

    async def look(self, rank: int, died: str, silent_s: float) -> None:
        """See to what a worker's heartbeat says; raises as `lose`."""
        limit, worker = self._deadlines.heartbeat_s, self._leaders.get(rank)
        if worker is None or self._state[rank] != "up":
            return
        if silent_s > limit and not died:
            died = f"it did not answer for {limit:g} s"
            found = await worker.diagnosed("answering heartbeats")
            await worker.call("giving its vLLM up", "give_up_engine", "heartbeat_s", died)
            died += found
        if died:
            self.lose(rank, worker.engine_lost(f"died: {died}"))

    async def settle(self) -> None:
        """Wait for restarts under way; raises what one failed with."""
        while self._restarts:
            await asyncio.wait(set(self._restarts))
            await asyncio.sleep(0)
        if self.failed.done():
            self.failed.result()

    def stop(self) -> None:
        for task in self._restarts:
            task.cancel()

    def _tell(self) -> None:
        """Wake those who wait for a replica."""
        self._changed.set()
        self._changed = asyncio.Event()
