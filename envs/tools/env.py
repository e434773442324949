"""A base for environments whose policy calls tools: what is left to write is the task and its end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Mapping, Sequence
from inspect import getattr_static
from typing import Any, ClassVar

import msgspec
from gymnasium.error import ResetNeeded

from envs.base import Messages, ResetResult, StepResult, TextEnv, maybe_await
from envs.tools.formats import FORMATS, Call, parse
from envs.tools.tool import Tool
from envs.tools.toolbox import MAX_RESULT, Answered, Toolbox
from k2rl.errors import ConfigError
from k2rl.types import Message, Task, ToolCall, ToolSpec


class _End(msgspec.Struct, frozen=True):
    reward: float
    truncated: bool
    components: dict[str, float]
    detail: str


class ToolEnv(TextEnv):
    """An environment whose tools are its methods with `@tool`.

    A turn with calls is answered with a `tool` message for each; a turn without goes to `answer`. Tools,
    `begin` and `answer` may be `async def`; if one is, so are `reset` and `step`. `end` ends the episode,
    from `answer` or from a tool. Bad calls (no such tool, bad JSON, wrong types, too slow) are answered with
    an error the policy can read.

    Components: `calls` and `bad_calls`, and those given to `end`.
    """

    parallel: ClassVar[bool] = True
    """Whether the calls of a turn run at once; where they change common state, one after the other."""
    max_result: ClassVar[int] = MAX_RESULT
    """Characters of a tool's answer."""

    def __init__(self, format: str = "auto") -> None:
        """`format`: how the policy writes calls: `hermes` (Qwen too), `llama`, `kimi`, or whichever it uses.

        Raises:
            ConfigError: there is no such format.
        """
        super().__init__()
        if format != "auto" and format not in FORMATS:
            raise ConfigError(f"format={format!r} is none of: auto, {', '.join(FORMATS)}")
        self._parse = parse if format == "auto" else FORMATS[format].parse
        self._toolbox = Toolbox(self.own_tools(), parallel=self.parallel, max_result=self.max_result)
        self._running = False
        self._ending: _End | None = None

    @abstractmethod
    def begin(self, task: Task) -> Messages | Awaitable[Messages]:
        """Set up the task's episode; gives its first messages."""

    @abstractmethod
    def answer(self, text: str) -> Messages | Awaitable[Messages]:
        """Take a turn without calls: give what is said to it, or call `end`."""

    def own_tools(self) -> list[Tool]:
        """The tools; override it to add some that are no methods, or to choose."""
        names = [name for name in dir(type(self)) if isinstance(getattr_static(type(self), name), Tool)]
        return [getattr(self, name) for name in names]

    def use_tools(self, tools: Sequence[Tool]) -> None:
        """Use these tools in this episode; for `begin`, where they are not known before."""
        self._toolbox = Toolbox(tools, parallel=self.parallel, max_result=self.max_result)

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        return self._toolbox.specs

    def end(
        self,
        reward: float,
        components: Mapping[str, float] | None = None,
        *,
        truncated: bool = False,
        detail: str = "",
    ) -> Messages:
        """End the episode with this turn; gives no messages, so that `answer` can return it."""
        self._ending = _End(float(reward), truncated, dict(components or {}), detail)
        return ()

    def resume(self, calls: int) -> None:
        """Go on with an episode in which so many calls were made: for `restore`."""
        self._toolbox.count, self._running, self._ending = calls, True, None

    def reset(  # type: ignore[override]  # as in TextEnv
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult | Awaitable[ResetResult]:
        task = self.start_episode(seed, options)
        self.resume(0)
        first = self.begin(task)
        if isinstance(first, tuple):
            return first, {"task": task}

        async def begun() -> ResetResult:
            return await maybe_await(first), {"task": task}

        return begun()

    def step(self, action: str) -> StepResult | Awaitable[StepResult]:  # type: ignore[override]
        """Do the turn's calls, or take its answer.

        Raises:
            gymnasium.error.ResetNeeded: if no episode is running.
            Exception: what a tool or `answer` raised, but a ToolError.
        """
        if not self._running:
            raise ResetNeeded("the episode is over or was never begun: call reset()")
        turn = self._parse(action)
        if turn.calls:
            if self._toolbox.is_async:
                return self._called(turn.calls)
            return self._result(self._toolbox.run_blocking(turn.calls))
        said = self.answer(turn.content)
        return self._result(Answered(said, 0)) if isinstance(said, tuple) else self._answered(said)

    async def _called(self, calls: Sequence[Call]) -> StepResult:
        return self._result(await self._toolbox.run(calls))

    async def _answered(self, said: Awaitable[Messages]) -> StepResult:
        return self._result(Answered(await said, 0))

    def _result(self, answered: Answered) -> StepResult:
        calls = sum(message.role == "tool" for message in answered.messages)
        components = {"calls": float(calls), "bad_calls": float(answered.bad)}
        info: dict[str, Any] = {"reward_components": components}
        if self._ending is None:
            return answered.messages, 0.0, False, False, info
        end, self._running = self._ending, False
        components |= end.components
        info["detail"] = end.detail
        return answered.messages, end.reward, not end.truncated, end.truncated, info


def calling(name: str, index: int = 0, /, **arguments: Any) -> Message:
    """A policy turn that makes one call, the episode's `index`-th: for demonstrations and tests."""
    return Message("assistant", "", (ToolCall(f"functions.{name}:{index}", name, arguments),))
