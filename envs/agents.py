"""Agents as they are: harnesses that know no environment, but an OpenAI-compatible endpoint.

Such an agent decides itself what it asks the model, when, with which tools and how often. A run gives it an
endpoint of its own for each episode, which answers with the policy and records what was sampled.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import shlex
import signal
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn

import msgspec

from envs.base import TextEnv
from k2rl.types import Split, Task, prepare

TAIL_BYTES = 1 << 16
"""Of a command's output, in which its last line is looked for."""
STDERR_SHOWN = 500
"""Characters of a failed command's complaint."""


class Outcome(msgspec.Struct, frozen=True):
    """How an agent's episode ended, for the rubric: a reward and named parts of it."""

    reward: float
    components: dict[str, float] = {}


class AgentEnv(TextEnv):
    """An environment whose episodes an agent plays by itself. Subclasses give `tasks` and `run_agent`."""

    @abstractmethod
    def run_agent(self, task: Task, base_url: str, api_key: str) -> Outcome | Awaitable[Outcome]:
        """Play one episode against the endpoint; may be `async def`, and else has a thread of its own.

        The endpoint refuses (status 400) what is beyond the episode's limits. An agent that then raises has
        ended its episode there, with a reward of 0; any other error makes the episode a failed one, which is
        masked and not scored. When it is cancelled no process of it may stay.
        """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is played by its agent, not with reset() and step()")

    def step(self, action: str) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is played by its agent, not with reset() and step()")


Tasks = Callable[[Split, int], Iterator[Task]]


class FunctionAgentEnv(AgentEnv):
    """A function of yours as the agent: `async def agent(task, base_url, api_key)` returns the reward."""

    def __init__(
        self,
        agent: str | Callable[[Task, str, str], Any],
        tasks: str | Tasks,
        kinds: Sequence[str] = ("default",),
    ) -> None:
        """
        Args:
            agent: the function, or `module:function`. It returns the reward, or `(reward, components)`; 0
                where another rubric judges. One that is not `async` gets a thread of its own.
            tasks: `tasks(split, seed)` as in `TextEnv`, or `module:function`.
            kinds: of the tasks.

        Raises:
            ValueError: there is no such function.
        """
        super().__init__()
        self._agent = _function(agent, "agent")
        self._tasks = _function(tasks, "tasks")
        self.kinds = tuple(kinds)

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        return iter(self._tasks(split, seed))

    def run_agent(self, task: Task, base_url: str, api_key: str) -> Outcome | Awaitable[Outcome]:
        value = self._agent(task, base_url, api_key)
        return _awaited(value) if inspect.isawaitable(value) else outcome(value)


class CommandAgentEnv(AgentEnv):
    """A command as the agent: OPENAI_BASE_URL and OPENAI_API_KEY in its environment, the task on stdin."""

    def __init__(
        self,
        command: str | Sequence[str],
        tasks: str | Tasks,
        kinds: Sequence[str] = ("default",),
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """
        Args:
            command: what is run for each episode, without a shell. It reads the task as a line of JSON, and
                its last line is the reward, or `{"reward": 1.0, "components": {…}}`. When it ends, so does
                all of its process group.
            tasks: `tasks(split, seed)` as in `TextEnv`, or `module:function`.
            kinds: of the tasks.
            env: further variables.
            cwd: its working folder.

        Raises:
            ValueError: the command is empty, or there is no such function.
        """
        super().__init__()
        self._command = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
        if not self._command:
            raise ValueError("the command is empty")
        self._tasks = _function(tasks, "tasks")
        self.kinds = tuple(kinds)
        self._env = {name: str(value) for name, value in (env or {}).items()}
        self._cwd = cwd

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        return iter(self._tasks(split, seed))

    async def run_agent(self, task: Task, base_url: str, api_key: str) -> Outcome:
        """See `AgentEnv.run_agent`.

        Raises:
            RuntimeError: it ended with another code than 0.
            ValueError: its last line is no reward.
        """
        given = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": api_key}
        # Files, not pipes: what the command leaves running holds a pipe open, and nobody would see the end.
        with TemporaryFile() as stdin, TemporaryFile() as stdout, TemporaryFile() as stderr:
            stdin.write(msgspec.json.encode(task) + b"\n")
            stdin.seek(0)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=self._cwd,
                env={**os.environ, **self._env, **given},
                start_new_session=True,
            )
            try:
                await process.wait()
            finally:
                with suppress(ProcessLookupError):  # the group, whose leader may be gone before the others
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            out, err = _tail(stdout), _tail(stderr)
        if process.returncode:
            raise RuntimeError(
                f"{self._command[0]} ended with code {process.returncode}: {err.strip()[-STDERR_SHOWN:]}"
            )
        last = out.strip().rpartition("\n")[2]
        try:
            return msgspec.json.decode(last, type=Outcome) if last[:1] == "{" else outcome(float(last))
        except (ValueError, msgspec.MsgspecError) as error:
            raise ValueError(f"the last line of {self._command[0]} is no reward: {last[:100]!r}") from error


def outcome(value: Any) -> Outcome:
    """What an agent function returned.

    Raises:
        TypeError: it is no reward.
        ValueError: it is not finite.
    """
    reward, components = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    if isinstance(value, Outcome):
        reward, components = value.reward, value.components
    if not isinstance(reward, (int, float)) or not isinstance(components, Mapping):
        raise TypeError(f"the agent returned {value!r}, not its reward or (reward, components)")
    numbers = {str(name): float(part) for name, part in components.items()}
    for name, number in {"reward": float(reward), **numbers}.items():
        if not math.isfinite(number):
            raise ValueError(f"the agent's {name} is {number}, not a finite number")
    return Outcome(float(reward), numbers)


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL_BYTES))
    return file.read().decode(errors="replace")


async def _awaited(value: Awaitable[Any]) -> Outcome:
    return outcome(await value)


def _function(target: str | Callable[..., Any], what: str) -> Callable[..., Any]:
    if callable(target):
        return target
    module, _, name = str(target).partition(":")
    if not module or not name:
        raise ValueError(f"{what}={target!r}: write it as module:function")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ValueError(f"{what}={target!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{what}={target!r} is no function")
    function: Callable[..., Any] = found
    return function


prepare(Outcome)
