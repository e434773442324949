"""The contract between an environment and the episode runner."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, TypeVar

import gymnasium
from gymnasium.spaces import Space

from envs.spaces import ChatSpace, FreeText
from k2rl.types import Message, Split, Task, ToolSpec
from rubrics.base import Rubric
from rubrics.environment import EnvironmentReward

Messages = tuple[Message, ...]
ResetResult = tuple[Messages, dict[str, Any]]
"""New messages, info."""
StepResult = tuple[Messages, float, bool, bool, dict[str, Any]]
"""New messages, reward, terminated, truncated, info."""

T = TypeVar("T")


class TextEnv(gymnasium.Env[Messages, str], ABC):
    """A conversation with a policy, as a Gymnasium environment.

    An observation is the tuple of messages that are new since the policy's last turn, never the
    policy's own; an action is the policy's turn as text, without special tokens. Subclasses give
    `tasks`, `reset` and `step`; `reset` and `step` may be `async def`. An instance plays one episode
    at a time and is cheap to construct: the runner makes many.

    An answer that is wrong earns a low reward. A fault that is not the policy's (a lost service, a
    bug) is raised: the episode is masked from the loss instead of scored.
    """

    observation_space: Space[Messages]
    action_space: Space[str]

    kinds: tuple[str, ...] = ("default",)
    """The kinds of task there are; token budgets and metrics are kept per kind."""

    rubric: Rubric = EnvironmentReward()
    """Turns an episode into its reward; by default the sum of the step rewards, between 0 and 1."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The tools of the running episode, as the policy is told of them; read after `reset`.

        The chat template writes them into the prompt, and the policy's turns hold its calls as the model
        writes them: `envs.tools.ToolEnv` reads and answers those.
        """
        return ()

    def __init__(self) -> None:
        self.observation_space = ChatSpace()
        self.action_space = FreeText()

    @abstractmethod
    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """An endless stream of tasks, the same for the same split and seed.

        No task of one split may appear in the other, whatever the seeds.
        """

    @abstractmethod
    def reset(  # type: ignore[override]  # Gymnasium knows no asynchronous environments
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> ResetResult | Awaitable[ResetResult]:
        """Begin an episode and give its first messages; call `start_episode` first.

        `options={"task": task}` plays that task; without one, the seed draws one from `train`.
        """
        return super().reset(seed=seed, options=options)

    @abstractmethod
    def step(self, action: str) -> StepResult | Awaitable[StepResult]:  # type: ignore[override]
        """Take the policy's turn and answer it.

        `info["reward_components"]`, where given, is a dict of named floats; the runner sums each name
        over the episode.
        """

    def demonstration(self, task: Task) -> Sequence[str | Message] | None:
        """The policy's turns in an ideal episode, or None if the environment does not know them.

        A turn with tool calls is a `Message` of the assistant; the model's chat template writes it.
        """
        return None

    def snapshot(self) -> bytes | Awaitable[bytes | None] | None:
        """The running episode as it stands between two steps, for `restore`; None if it has no such form.

        Needed only to resume an unfinished episode in another process: without one it is kept alive
        there, or replayed from its actions. May be `async def`. It must not change the episode.
        """
        return None

    def restore(self, task: Task, snapshot: bytes) -> Awaitable[None] | None:
        """Resume the episode that `snapshot` was taken of, on a new instance, instead of `reset`.

        The next call is `step`, with the action it would have had. May be `async def`.

        Raises:
            NotImplementedError: the environment takes no snapshots.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no snapshots")

    def start_episode(self, seed: int | None, options: dict[str, Any] | None) -> Task:
        """Seed Gymnasium's generator and give the task of the new episode.

        Raises:
            TypeError: if `options["task"]` is not a `Task`.
            ValueError: if its kind is none of `kinds`.
        """
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = next(self.tasks("train", int(self.np_random.integers(2**31))))
        if not isinstance(task, Task):
            raise TypeError(f"options['task'] is {type(task).__name__}, not a Task")
        if task.kind not in self.kinds:
            raise ValueError(
                f"task {task.id} is of kind {task.kind!r}, but {type(self).__name__}.kinds is {self.kinds}"
            )
        return task


async def maybe_await(value: T | Awaitable[T]) -> T:
    """The value, awaited first if it is awaitable: `await maybe_await(env.step(action))`."""
    if inspect.isawaitable(value):
        return await value
    return value
