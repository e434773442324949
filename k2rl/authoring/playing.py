"""Episodes of scripted turns, each answer looked at: what `k2rl envs check` sees of an environment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import msgspec

from envs.base import TextEnv
from envs.tools.formats import written
from k2rl.rollouts.hosting import call
from k2rl.types import Message, Task, ToolSpec
from rubrics.deadline import within


class BrokenContractError(Exception):
    """An environment that answers with something else than it should; says what and where."""


class Step(msgspec.Struct, frozen=True):
    """An answer of the environment; the first is that of `reset`, without reward."""

    messages: tuple[Message, ...]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    components: dict[str, float] = {}


class Played(msgspec.Struct, frozen=True):
    """An episode; two of the same task, seeds and turns are to be equal."""

    steps: tuple[Step, ...]
    tools: tuple[ToolSpec, ...]

    @property
    def over(self) -> bool:
        return self.steps[-1].terminated or self.steps[-1].truncated

    @property
    def reward(self) -> float:
        return sum(step.reward for step in self.steps)

    @property
    def components(self) -> dict[str, float]:
        """Each summed over the episode."""
        total: dict[str, float] = {}
        for step in self.steps:
            for name, value in step.components.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @property
    def messages(self) -> list[Message]:
        return [message for step in self.steps for message in step.messages]


async def play(env: TextEnv, task: Task, turns: Sequence[str | Message], deadline_s: float) -> Played:
    """Play a task with these turns, until they or the episode are at their end.

    Raises:
        BrokenContractError: an answer is not what the contract asks for.
        MissedDeadlineError: a call takes longer than `deadline_s`.
        Exception: what the environment raises.
    """
    answer = await within(deadline_s, call(env.reset, seed=task.seed, options={"task": task}))
    first = _reset(answer)
    tools = tuple(env.tools)
    if not all(isinstance(tool, ToolSpec) for tool in tools):
        raise BrokenContractError("tools holds something that is no ToolSpec")
    return Played((first, *await continued(env, turns, deadline_s)), tools)


async def continued(env: TextEnv, turns: Sequence[str | Message], deadline_s: float) -> list[Step]:
    """The answers to these turns, until the episode is over.

    Raises:
        as `play`.
    """
    steps: list[Step] = []
    for turn in turns:
        steps.append(_step(await within(deadline_s, call(env.step, written(turn)))))
        if steps[-1].terminated or steps[-1].truncated:
            break
    return steps


def _reset(answer: Any) -> Step:
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
        raise BrokenContractError(f"reset gives {_shown(answer)}, not (messages, info)")
    messages = _messages(answer[0], "reset")
    if not messages:
        raise BrokenContractError("reset gives no message: the policy would have nothing to answer")
    return Step(messages)


def _step(answer: Any) -> Step:
    if not isinstance(answer, tuple) or len(answer) != 5:
        raise BrokenContractError(
            f"step gives {_shown(answer)}, not (messages, reward, terminated, truncated, info)"
        )
    messages, reward, terminated, truncated, info = answer
    found = _messages(messages, "step")
    value = _number(reward, "step's reward")
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool):
            raise BrokenContractError(f"step's {name} is {_shown(flag)}, not a bool")
    if not isinstance(info, dict) or not isinstance(info.get("reward_components", {}), dict):
        raise BrokenContractError("step's info, and its reward_components, are to be dicts")
    components = {
        str(name): _number(number, f"reward component {name}")
        for name, number in info.get("reward_components", {}).items()
    }
    if not (terminated or truncated or found):
        raise BrokenContractError("step gives no message though the episode goes on")
    return Step(found, value, terminated, truncated, components)


def _messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, tuple) or not all(isinstance(message, Message) for message in messages):
        raise BrokenContractError(f"{where} gives {_shown(messages)}, not a tuple of Messages")
    for message in messages:
        if message.role == "assistant":
            raise BrokenContractError(f"{where} gives a message of the assistant: those are the policy's own")
        if not isinstance(message.content, str):
            raise BrokenContractError(f"{where} gives a message whose content is {_shown(message.content)}")
    return messages


def _number(value: Any, what: str) -> float:
    if not isinstance(value, Real) or not math.isfinite(value):
        raise BrokenContractError(f"{what} is {_shown(value)}, not a finite number")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
