"""What a step is: how many groups are in play, when it has enough, and which finished ones it takes."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from k2rl.config import Config
from k2rl.rollouts.groups import Group, teaches
from k2rl.types import Task

Draw = Callable[[int, int], Awaitable[list[Task]]]
"""The tasks of a step, and of its further draws (0, 1, …)."""


def staleness(version: int, oldest: int, config: Config) -> int:
    """Steps of training between two versions of the weights, which count optimizer updates."""
    return max(version - oldest, 0) // config.train.updates_per_step


class InPlay(Protocol):
    """The groups in play, as an iteration sees them."""

    #: Episodes that have ended, ever.
    played: int

    @property
    def open(self) -> list[Group]:
        """Those that are not over."""
        ...

    @property
    def whole(self) -> list[Group]:
        """Those that are, in the order in which they were drawn."""
        ...

    async def start_group(self, task: Task, index: int, step: int, temperature: float) -> bool:
        """Put a group into play; False if it is there already."""
        ...

    def fill(self) -> None:
        """Seat waiting episodes while there is room."""
        ...

    def hurry(self, groups: list[Group]) -> None:
        """Let these come first."""
        ...


class Iteration:
    """One step: which groups it starts, when it is over, and what it takes."""

    def __init__(
        self, config: Config, pool: InPlay, draw: Draw, step: int, temperature: float, version: int
    ) -> None:
        """`version`: of the weights that the engine serves."""
        self._config, self._pool, self._draw = config, pool, draw
        self._step, self._temperature, self._version = step, temperature, version
        rollout = config.rollout
        self._parks = rollout.surplus == "park"
        self._target = rollout.tasks_per_step
        self._width = math.ceil(rollout.oversample * self._target)
        self._most_useless = math.floor(rollout.refill * self._target)
        self._tasks: list[Task] = []
        self._draws = 0
        self._index = 0
        self._ending = False
        self._known: dict[str, bool] = {}
        self.drawn = 0
        self._played_before = pool.played
        pool.hurry([group for group in pool.open if self._is_due(group)])

    @property
    def progress(self) -> tuple[int, int]:
        """Episodes that have ended in this step, and how many a step has."""
        total = self._target * self._config.rollout.group_size
        return min(self._pool.played - self._played_before, total), total

    async def advance(self, seconds: float, tokens: int) -> bool:
        """Start what may be started; whether the step is over."""
        self._ending = self._ending or self._has_enough(seconds, tokens)
        while not self._ending and self._wants_another():
            await self._start_another()
        self._pool.fill()
        if self._ending:
            return not any(map(self._is_due, self._pool.open))
        return not self._pool.open

    def taken(self) -> list[Group]:
        """Of the finished groups those that would get too old, the first ones, and all that teach nothing."""
        finished, useful = self._pool.whole, self._useful()
        due = [group for group in useful if self._is_due(group)]
        others = [group for group in useful if group not in due]
        chosen = {group.id for group in [*due, *others[: max(self._target - len(due), 0)]]}
        return [group for group in finished if group.id in chosen or not self._is_useful(group)]

    def _has_enough(self, seconds: float, tokens: int) -> bool:
        rollout = self._config.rollout
        useful = len(self._useful())
        if useful >= self._target or len(self._pool.whole) - useful > self._most_useless:
            return True
        # Without a finished group there is nothing to learn, and the weights would stay as they are.
        over_budget = (rollout.step_tokens and tokens >= rollout.step_tokens) or (
            rollout.step_s and seconds >= rollout.step_s
        )
        return bool(useful and over_budget)

    def _wants_another(self) -> bool:
        kept = 0 if self._parks else len(self._useful())
        return len(self._pool.open) + kept < self._width

    async def _start_another(self) -> None:
        if self._index == len(self._tasks):
            self._tasks += await self._draw(self._step, self._draws)
            self._draws += 1
        task = self._tasks[self._index]
        if await self._pool.start_group(task, self._index, self._step, self._temperature):
            self.drawn += 1
        self._index += 1

    def _useful(self) -> list[Group]:
        return [group for group in self._pool.whole if self._is_useful(group)]

    def _is_useful(self, group: Group) -> bool:
        """Of a finished group: whether it counts towards the step's."""
        if not self._config.rollout.refill:
            return True
        if group.id not in self._known:
            self._known[group.id] = teaches(group.members(), self._config, self._step)
        return self._known[group.id]

    def _is_due(self, group: Group) -> bool:
        """Whether its tokens would be too old for the next step."""
        oldest = group.oldest_version
        if not self._parks or oldest is None:
            return False
        return staleness(self._version, oldest, self._config) >= self._config.rollout.max_staleness
