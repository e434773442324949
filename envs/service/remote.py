"""The client of `k2rl envs serve`, which is itself an environment: training against it is configuration."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from envs.base import ResetResult, StepResult, TextEnv
from envs.service import wire
from k2rl.types import Message, Split, Task, ToolSpec, Trajectory, Verdict
from rubrics.base import Rubric
from rubrics.environment import EnvironmentReward
from sandboxes.borrowing import CONNECT_SECONDS, Lender, borrow_anywhere, checked_urls

T = TypeVar("T")

CLOSE_SECONDS = 10.0


class EnvironmentServiceError(Exception):
    """The service failed, or its environment did: a failed episode, never a score."""


class _UnreachableError(EnvironmentServiceError):
    """The service did not answer."""


class _FullError(EnvironmentServiceError):
    """The service plays as many episodes as it can."""


class _Service(Lender["_Episode"]):
    """The connection to one service."""

    noun = "environment service"
    error, unreachable, full = EnvironmentServiceError, _UnreachableError, _FullError

    async def begin(self, begin: wire.Begin, seconds: float) -> _Episode:
        asking = self.ask("POST", "/v1/episodes", begin, wire.Begun, seconds)
        return await self.borrow(asking, lambda begun: (begun.id, _Episode(self, begun), begun.lease))


class _Episode:
    """An episode that a service plays."""

    def __init__(self, service: _Service, begun: wire.Begun) -> None:
        self.begun = begun
        self._service = service
        self._ended: str | None = None

    def lost(self, why: str) -> None:
        self._ended = why
        self._service.given_back(self.begun.id)

    async def step(self, action: str, seconds: float) -> wire.Stepped:
        if self._ended is not None:
            raise EnvironmentServiceError(self._ended)
        path = f"/v1/episodes/{self.begun.id}"
        # Half a surrogate pair is no character, and nothing that a policy's tokens can be decoded to.
        step = wire.Step(action=action.encode(errors="replace").decode())
        return await self._service.ask("POST", path, step, wire.Stepped, seconds)

    async def close(self) -> None:
        """Where the service does not answer, the end of the lease closes it there."""
        if self._ended is None:
            self.lost("the episode was closed")
            with suppress(EnvironmentServiceError):
                path = f"/v1/episodes/{self.begun.id}"
                await self._service.ask("DELETE", path, None, type(None), CLOSE_SECONDS)


class _Services:
    """The connections of one event loop, which last while somebody has an episode or asks something."""

    def __init__(self, urls: Sequence[str], token: str | None) -> None:
        self.all = [_Service(url, token) for url in urls]
        self._users = 0

    async def __aenter__(self) -> _Services:
        self._users += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    def enter(self) -> None:
        self._users += 1

    async def leave(self) -> None:
        self._users -= 1
        if not self._users:
            await asyncio.gather(*(service.close() for service in self.all))

    async def ask(self, path: str, body: Any, answer: type[T], seconds: float) -> T:
        """Ask any that answers; raises what the last one did."""
        method = "GET" if body is None else "POST"
        *others, last = sorted(self.all, key=lambda service: service.crowding)
        for service in others:
            with suppress(_UnreachableError):
                return await service.ask(method, path, body, answer, seconds)
        return await last.ask(method, path, body, answer, seconds)


_connections: WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[tuple[tuple[str, ...], str | None], _Services]
] = WeakKeyDictionary()
_known: dict[tuple[str, ...], wire.About] = {}
"""What services have said of themselves: the runner makes an environment for each episode."""


class RemoteEnv(TextEnv):
    """An environment that is played elsewhere, by one `k2rl envs serve` or several of the same."""

    def __init__(
        self,
        urls: Sequence[str] | str | None = None,
        token: str | None = None,
        open_seconds: float = 300.0,
        call_seconds: float = 300.0,
    ) -> None:
        """
        Args:
            urls: where the services are: `http://node1:8030`; by default those that the variable
                K2RL_ENVS_SERVICES lists, with spaces between them. An episode begins where most room is.
            token: what they ask for; by default the variable K2RL_ENVS_TOKEN.
            open_seconds: how long a new episode waits for room when all services are full.
            call_seconds: what an answer of a service may take.

        Raises:
            ValueError: no service is named, or with what is no address.
            EnvironmentServiceError: none answers.
        """
        super().__init__()
        if urls is None:
            urls = os.environ.get(wire.SERVICES_VARIABLE, "").split()
        self._urls = tuple(checked_urls(urls, "an environment service"))
        if not self._urls:
            raise ValueError(f"urls names no environment service, nor does {wire.SERVICES_VARIABLE}")
        self._token = token if token is not None else os.environ.get(wire.TOKEN_VARIABLE)
        self._open_seconds, self._call_seconds = open_seconds, call_seconds
        if self._urls not in _known:
            _known[self._urls] = self._ask_now("/v1/about", None, wire.About, CONNECT_SECONDS)
        about = _known[self._urls]
        self.kinds = tuple(about.kinds)
        low, high = about.reward_range
        self.rubric = EnvironmentReward(low, high) if about.sums_rewards else _RemoteRubric(self, low, high)
        self._episode: _Episode | None = None

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        start = 0
        while True:
            draw = wire.Draw(split=split, seed=seed, start=start, count=wire.MOST_TASKS)
            drawn = self._ask_now("/v1/tasks", draw, list[Task], self._call_seconds)
            yield from drawn
            if len(drawn) < wire.MOST_TASKS:
                return
            start += len(drawn)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        return self._episode.begun.tools if self._episode is not None else ()

    def demonstration(self, task: Task) -> Sequence[str | Message] | None:
        answer: Any = list[str | Message] | None
        turns: list[str | Message] | None = self._ask_now(
            "/v1/demonstration", task, answer, self._call_seconds
        )
        return turns

    async def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult:
        """See `TextEnv.reset`.

        Raises:
            EnvironmentServiceError: no service can play it.
        """
        await self._close()
        begin = wire.Begin(seed=seed, task=(options or {}).get("task"))
        services = self._services()
        services.enter()
        try:
            self._episode = await borrow_anywhere(
                services.all,
                lambda service: service.begin(begin, self._call_seconds),
                self._open_seconds,
                EnvironmentServiceError,
                EnvironmentServiceError,
            )
        except BaseException:
            await services.leave()
            raise
        begun = self._episode.begun
        return tuple(begun.messages), begun.info

    async def step(self, action: str) -> StepResult:  # type: ignore[override]
        """See `TextEnv.step`.

        Raises:
            EnvironmentServiceError: the environment raised or hangs there, or the service is gone.
        """
        if self._episode is None:
            raise EnvironmentServiceError("no episode is running: call reset()")
        stepped = await self._episode.step(action, self._call_seconds)
        return tuple(stepped.messages), stepped.reward, stepped.terminated, stepped.truncated, stepped.info

    def close(self) -> Awaitable[None] | None:  # type: ignore[override]
        """To be awaited, where an episode was begun."""
        return self._close() if self._episode is not None else None

    async def _close(self) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            await episode.close()
            await self._services().leave()

    async def judge(self, trajectory: Trajectory) -> Verdict:
        """The verdict of the environment's own rubric, where it is."""
        async with self._services() as services:
            return await services.ask("/v1/judge", trajectory, Verdict, self._call_seconds)

    def _services(self) -> _Services:
        ours = _connections.setdefault(asyncio.get_running_loop(), {})
        key = self._urls, self._token
        if key not in ours:
            ours[key] = _Services(*key)
        return ours[key]

    def _ask_now(self, path: str, body: Any, answer: type[T], seconds: float) -> T:
        """Ask, and block until there is an answer; also in a thread that has an event loop."""

        async def ask() -> T:
            async with _Services(self._urls, self._token) as services:
                return await services.ask(path, body, answer, seconds)

        return _blocking(ask)


def _blocking(work: Callable[[], Awaitable[T]]) -> T:
    """What `work` comes to, in a loop and a thread of its own."""
    outcome: list[Any] = [None, None]

    async def awaited() -> T:
        return await work()

    def run() -> None:
        try:
            outcome[0] = asyncio.run(awaited())
        # Raised again below, where somebody waits for it.
        except BaseException as error:  # noqa: BLE001
            outcome[1] = error

    thread = threading.Thread(target=run, name="environment service", daemon=True)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


class _RemoteRubric(Rubric):
    """The rubric of an environment that is elsewhere, which is asked there."""

    def __init__(self, env: RemoteEnv, low: float, high: float) -> None:
        self._env = env
        self.reward_range = (low, high)

    async def judge(self, trajectory: Trajectory) -> Verdict:
        return await self._env.judge(trajectory)
