"""Calls, done: each checked, in time, at the same time as its siblings, and answered whatever it was."""

from __future__ import annotations

import asyncio
import difflib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from envs.tools.formats import Call
from envs.tools.tool import Tool, ToolError, as_text
from k2rl.types import Message, ToolSpec

MAX_CALLS = 16
"""Of one turn; further ones are answered with an error."""
MAX_RESULT = 4000
"""Characters of an answer; what is longer loses its middle."""
_MAX_ID = 200


class Answered(msgspec.Struct, frozen=True):
    """What came of a turn's calls: a `tool` message for each, in their order, and how many went wrong."""

    messages: tuple[Message, ...]
    bad: int


class Toolbox:
    """The tools of one episode, and the ids of its calls: `functions.{name}:{index}`, over all turns."""

    def __init__(self, tools: Iterable[Tool], *, parallel: bool = True, max_result: int = MAX_RESULT) -> None:
        """`parallel`: the calls of a turn run at once; else one after the other, as they were written.

        Raises:
            ValueError: two tools have the same name.
        """
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            if self._tools.setdefault(tool.spec.name, tool) is not tool:
                raise ValueError(f"two tools are called {tool.spec.name}")
        self._parallel, self._max_result = parallel, max_result
        self._count = 0

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self._tools.values())

    @property
    def is_async(self) -> bool:
        """Whether a tool is to be awaited: then `run` must be used instead of `run_blocking`."""
        return any(tool.is_async for tool in self._tools.values())

    @property
    def count(self) -> int:
        """Calls so far; a restored episode goes on from where it was."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self._count = count

    async def run(self, calls: Sequence[Call]) -> Answered:
        """Answer a turn's calls.

        A plain tool runs in a thread of its own; one that is late goes on there, unheard.

        Raises:
            Exception: what a tool raised, but a ToolError.
        """
        if not self._parallel:
            return self._answered(calls, [await self._answer(call, n) for n, call in enumerate(calls)])
        doing = [asyncio.ensure_future(self._answer(call, place)) for place, call in enumerate(calls)]
        try:
            return self._answered(calls, await asyncio.gather(*doing))
        finally:
            for one in doing:
                one.cancel()

    def run_blocking(self, calls: Sequence[Call]) -> Answered:
        """As `run`, where all tools are plain functions and no event loop is needed."""
        answers: list[str | _Failed] = []
        started = [self._start(call, place) for place, call in enumerate(calls)] if self._parallel else []
        for place, call in enumerate(calls):
            answers.append(_wait(started[place] if started else self._start(call, place)))
        return self._answered(calls, answers)

    async def _answer(self, call: Call, place: int) -> str | _Failed:
        try:
            tool, arguments = self._bind(call, place)
        except ToolError as error:
            return _Failed(str(error))
        if tool.is_async:
            answer = asyncio.ensure_future(tool.function(**arguments))
        else:
            answer = asyncio.wrap_future(_in_thread(tool.function, arguments))
        try:
            done, _ = await asyncio.wait({answer}, timeout=tool.timeout_s)
            return as_text(answer.result()) if done else _Failed(_late(tool))
        except ToolError as error:
            return _Failed(str(error))
        finally:
            answer.cancel()

    def _start(self, call: Call, place: int) -> _Started | _Failed:
        try:
            tool, arguments = self._bind(call, place)
        except ToolError as error:
            return _Failed(str(error))
        return _Started(tool, _in_thread(tool.function, arguments))

    def _bind(self, call: Call, place: int) -> tuple[Tool, dict[str, Any]]:
        if place >= MAX_CALLS:
            raise ToolError(f"a turn may hold {MAX_CALLS} calls; this is one too many")
        if call.problem:
            raise ToolError(call.problem)
        tool = self._tools.get(call.name)
        if tool is None:
            close = difflib.get_close_matches(call.name[:80], self._tools, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ToolError(f"there is no tool {call.name[:80]!r}{hint} There are: {', '.join(self._tools)}")
        return tool, tool.bind(call.arguments)

    def _answered(self, calls: Sequence[Call], answers: Sequence[str | _Failed]) -> Answered:
        messages = []
        for call, answer in zip(calls, answers, strict=True):
            text = f"error: {answer.reason}" if isinstance(answer, _Failed) else answer
            messages.append(Message("tool", shortened(text, self._max_result), tool_call_id=self._id(call)))
            self._count += 1
        return Answered(tuple(messages), sum(isinstance(answer, _Failed) for answer in answers))

    def _id(self, call: Call) -> str:
        """The id that the policy wrote, or the one it would have written."""
        if call.id is not None and len(call.id) <= _MAX_ID:
            return call.id
        return f"functions.{call.name[:80] or 'unknown'}:{self._count}"


class _Failed(msgspec.Struct, frozen=True):
    reason: str


class _Started:
    def __init__(self, tool: Tool, future: Future[Any]) -> None:
        self.tool, self.future = tool, future
        self.deadline = time.monotonic() + tool.timeout_s


def _wait(started: _Started | _Failed) -> str | _Failed:
    if isinstance(started, _Failed):
        return started
    try:
        result = started.future.result(max(0.0, started.deadline - time.monotonic()))
    except ToolError as error:
        return _Failed(str(error))
    except TimeoutError:
        if started.future.done():
            raise
        return _Failed(_late(started.tool))
    return as_text(result)


def _late(tool: Tool) -> str:
    return f"{tool.spec.name} gave no answer within {tool.timeout_s:g} s"


def _in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Future[Any]:
    """Begin a call in a daemon thread: one that hangs can neither be ended nor keep the process alive."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            result = function(**arguments)
        # Raised again where it is waited for.
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=getattr(function, "__qualname__", "tool"), daemon=True).start()
    return future


def shortened(text: str, limit: int = MAX_RESULT) -> str:
    """A text with its middle left out if it is long."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
