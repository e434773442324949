"""Who answers in an evaluation: a model behind HTTP, or one of the baselines that prove a suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from envs.base import TextEnv
from envs.tools.formats import written
from k2rl.errors import ConfigError, RunError
from k2rl.types import Message, Task


class Reply(msgspec.Struct, frozen=True):
    """A turn of the policy, and what it cost in tokens."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    #: Cut off at `max_tokens`.
    truncated: bool = False


class ContextFullError(Exception):
    """The conversation does not fit the model's context: the episode ends here."""


class Policy(Protocol):
    #: What its answers depend on, for the cache; None: they are not kept.
    identity: str | None

    async def turn(
        self, task: Task, messages: Sequence[Message], number: int, sample: int, env: TextEnv
    ) -> Reply:
        """The policy's turn `number` (from 0) in sample `sample` of a task.

        Raises:
            ContextFullError: the messages are too many for the model.
            RunError: the model cannot be asked any more.
        """
        ...

    async def close(self) -> None:
        """Put away what it holds."""
        ...


class Scripted:
    """A baseline: turns that are known beforehand."""

    identity: str | None = None

    async def turn(
        self, task: Task, messages: Sequence[Message], number: int, sample: int, env: TextEnv
    ) -> Reply:
        turns = self.turns(task, env)
        return Reply(turns[number] if number < len(turns) else "")

    def turns(self, task: Task, env: TextEnv) -> Sequence[str]:
        raise NotImplementedError

    async def close(self) -> None:
        return None


class Gold(Scripted):
    """The environment's demonstration: a suite in which it does not score full marks is wrong."""

    def turns(self, task: Task, env: TextEnv) -> Sequence[str]:
        turns = env.demonstration(task)
        if turns is None:
            raise RunError(f"model=gold: task {task.id} has no solution with it")
        return [written(turn) for turn in turns]


class Null(Scripted):
    """Empty answers: a suite in which they score is wrong."""

    def turns(self, task: Task, env: TextEnv) -> Sequence[str]:
        return ()


class Cheat(Scripted):
    """An answer that solves nothing and wants to be scored: a suite in which it is can be cheated."""

    def __init__(self, name: str) -> None:
        """Raises:
        ConfigError: there is none of that name.
        """
        from envs.coding.cheats import CHEATS

        if name not in CHEATS:
            raise ConfigError(f"model=cheat:{name}: there are: {', '.join(CHEATS)}")
        self._cheat = CHEATS[name]

    def turns(self, task: Task, env: TextEnv) -> Sequence[str]:
        turns = env.demonstration(task)
        return () if turns is None else self._cheat([written(turn) for turn in turns])
