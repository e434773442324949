"""One environment behind HTTP: an episode is an instance of its own, lent for a lease.

What the environment does wrong (it raises, hangs, gives nonsense) ends its episode with a `Fault` that says
so, and concerns no other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import msgspec
from aiohttp import web

from envs.base import TextEnv
from envs.service import wire
from k2rl.rollouts.hosting import CLOSE_DEADLINE_S, call
from k2rl.types import Message, Task, ToolSpec, Trajectory
from rubrics.base import judge_safely
from rubrics.deadline import MissedDeadlineError, within
from rubrics.environment import EnvironmentReward
from sandboxes.lending import LendingOptions, LendingServer, answer
from sandboxes.wire import Fault

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions(LendingOptions):
    """How an environment is served, and to whom."""

    what: ClassVar[str] = "an environment service"
    does: ClassVar[str] = "plays for"
    token_variable: ClassVar[str] = wire.TOKEN_VARIABLE

    capacity: int = 256
    #: Seconds that a call of the environment may take.
    call_seconds: float = 300.0


class _EnvironmentFaultError(Exception):
    """What the environment did wrong."""


@dataclass
class _Played:
    env: TextEnv
    #: Of one step at a time.
    lock: asyncio.Lock


_First = tuple[list[Message], list[ToolSpec], dict[str, Any]]
"""Messages, tools and info of a new episode."""


class EnvironmentServer(LendingServer[_Played]):
    """Serves one environment. It belongs to one event loop."""

    noun, nouns = "episode", "episodes"

    def __init__(self, id: str, make_env: Callable[[], TextEnv], options: ServiceOptions) -> None:
        """`make_env` is called for each episode, and once for what needs none."""
        super().__init__(options)
        self._id = id
        self._make_env = make_env
        self._options = options
        self._env = make_env()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/about", self._about)
        router.add_post("/v1/tasks", self._tasks)
        router.add_post("/v1/demonstration", self._demonstration)
        router.add_post("/v1/judge", self._judge)
        router.add_post("/v1/episodes", self._begin)
        router.add_post("/v1/episodes/{id}", self._step)
        router.add_delete("/v1/episodes/{id}", self._close)

    async def stop(self) -> None:
        """Stop listening, and close every environment."""
        await super().stop()
        await asyncio.gather(*(self.take_back(id) for id in list(self._lent)))
        await self._put_away(self._env)

    async def close_thing(self, thing: _Played) -> None:
        await self._put_away(thing.env)

    async def _put_away(self, env: TextEnv) -> None:
        try:
            await within(CLOSE_DEADLINE_S, call(env.close))
        # Plug-in code may raise anything, and nobody waits for it any more.
        except Exception as error:
            logger.warning("close() of %s failed", self._id, exc_info=error)

    def health(self) -> dict[str, Any]:
        load = self.load()
        return {"env": self._id, "open": load.open, "capacity": load.capacity}

    def fault_of(self, error: Exception) -> Fault | None:
        known = isinstance(error, _EnvironmentFaultError)
        return Fault(kind="failed", message=str(error)) if known else None

    async def _about(self, request: web.Request) -> web.Response:
        rubric = self._env.rubric
        about = wire.About(
            env=self._id,
            kinds=list(self._env.kinds),
            reward_range=rubric.reward_range,
            sums_rewards=type(rubric) is EnvironmentReward,
        )
        return answer(about)

    async def _tasks(self, request: web.Request) -> web.Response:
        draw = msgspec.msgpack.decode(await request.read(), type=wire.Draw)
        if not (draw.start >= 0 and 0 <= draw.count <= wire.MOST_TASKS):
            raise msgspec.ValidationError(f"start and count are at least 0, count at most {wire.MOST_TASKS}")

        def tasks() -> list[Task]:
            stream = self._env.tasks(draw.split, draw.seed)
            return [*itertools.islice(stream, draw.start, draw.start + draw.count)]

        return answer(_checked(await self._asked("tasks", call(tasks)), list[Task], "tasks"))

    async def _demonstration(self, request: web.Request) -> web.Response:
        task = msgspec.msgpack.decode(await request.read(), type=Task)
        return answer(await self._asked("demonstration", call(self._env.demonstration, task)))

    async def _judge(self, request: web.Request) -> web.Response:
        trajectory = msgspec.msgpack.decode(await request.read(), type=Trajectory)
        return answer(await judge_safely(self._env.rubric, trajectory, self._options.call_seconds))

    async def _begin(self, request: web.Request) -> web.Response:
        begin = msgspec.msgpack.decode(await request.read(), type=wire.Begin)
        if self.full:
            return self.all_lent()
        id, (messages, tools, info) = await self.lend(self._begun(begin))
        return answer(wire.Begun(id=id, lease=self._options.lease, messages=messages, tools=tools, info=info))

    async def _begun(self, begin: wire.Begin) -> tuple[_Played, _First]:
        env = await self._asked("the constructor", call(self._make_env))
        options = {} if begin.task is None else {"task": begin.task}
        try:
            given = await self._asked("reset", call(env.reset, seed=begin.seed, options=options))
            messages, info = _unpacked(given, 2, "reset")
            tools = _checked(list(env.tools), list[ToolSpec], "tools")
            return _Played(env, asyncio.Lock()), (_messages(messages, "reset"), tools, _sendable(info))
        except BaseException:
            await self._put_away(env)
            raise

    async def _step(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if self.lent(id) is None:
            return self.gone(id)
        step = msgspec.msgpack.decode(await request.read(), type=wire.Step)
        played = self.lent(id)
        if played is None:  # closed while the body came in
            return self.gone(id)
        if played.lock.locked():
            raise _EnvironmentFaultError("the episode's last step is not over yet")
        async with played.lock:
            try:
                given = await self._asked("step", call(played.env.step, step.action))
                stepped = _stepped(given)
            except _EnvironmentFaultError:
                await self.take_back(id)
                raise
        self.lent(id)
        return answer(stepped)

    async def _close(self, request: web.Request) -> web.Response:
        await self.take_back(request.match_info["id"])
        return answer(None)

    async def _asked(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await within(self._options.call_seconds, work)
        except MissedDeadlineError:
            late = f"{what} of {self._id} is not done after {self._options.call_seconds:g} s"
            raise _EnvironmentFaultError(late) from None
        # Plug-in code may raise anything.
        except Exception as error:
            logger.warning("%s of %s failed", what, self._id, exc_info=error)
            raise _EnvironmentFaultError(
                f"{what} of {self._id} raised {type(error).__name__}: {error}"
            ) from error


def _stepped(given: Any) -> wire.Stepped:
    messages, reward, terminated, truncated, info = _unpacked(given, 5, "step")
    try:
        number = float(reward)
    except (TypeError, ValueError):
        raise _EnvironmentFaultError(f"step gave {reward!r} as reward, which is no number") from None
    return wire.Stepped(
        messages=_messages(messages, "step"),
        reward=number,
        terminated=bool(terminated),
        truncated=bool(truncated),
        info=_sendable(info),
    )


def _unpacked(given: Any, count: int, what: str) -> tuple[Any, ...]:
    if not isinstance(given, tuple) or len(given) != count:
        raise _EnvironmentFaultError(f"{what} gave {str(given)[:100]!r}, not a tuple of {count}")
    return given


def _messages(given: Any, what: str) -> list[Message]:
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    for message in found:
        if not isinstance(message, Message):
            raise _EnvironmentFaultError(f"{what} gave {str(message)[:100]!r} for a message")
    return found


def _checked(value: Any, type: Any, what: str) -> Any:
    """Raises:
    _EnvironmentFaultError: it is of another type.
    """
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type)
    except (TypeError, msgspec.MsgspecError) as error:
        raise _EnvironmentFaultError(f"{what} gave nonsense: {error}") from None
    return value


def _sendable(info: Any) -> dict[str, Any]:
    """What of an info can be written."""
    sendable = {}
    for name, value in (info if isinstance(info, dict) else {}).items():
        try:
            msgspec.msgpack.encode(value)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError):
            logger.debug("info[%r] cannot be sent", name)
        else:
            sendable[str(name)] = value
    return sendable
