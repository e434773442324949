"""The groups of a step: attempts at one task, what has become of them, and whether they teach anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from envs.base import TextEnv
from k2rl.config import Config
from k2rl.inference.engine import Generation, InferenceEngine, Sampling
from k2rl.objective.advantages import is_uniform
from k2rl.objective.budget import shaped_rewards
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.seeds import derive_seed
from k2rl.types import NO_WEIGHT_VERSION, Task, Trajectory


def attempts(
    task: Task, index: int, group_size: int, seed: int, step: int, temperature: float
) -> list[Attempt]:
    """`group_size` attempts at the task that a step draws as its `index`-th, from 0; seeded apart.

    A task that a step draws twice makes two groups.
    """
    group = f"step{step}-{index}-{task.id}"
    return [
        Attempt(f"{group}-{k}", group, task, temperature, derive_seed(seed, step, index, task.id, k))
        for k in range(group_size)
    ]


def drawn_at(group_id: str) -> tuple[int, int]:
    """The step that drew a group, and its index there."""
    found = re.match(r"step(\d+)-(\d+)-", group_id)
    if found is None:
        raise ValueError(f"{group_id!r} is no group of a training step")
    return int(found[1]), int(found[2])


class Seat:
    """An episode that is being played: its engine, its environment, and whether it waits for the former."""

    def __init__(self, episode: Episode, engine: InferenceEngine) -> None:
        self.episode = episode
        self._engine = engine
        self.env: TextEnv | None = None
        #: Whether the environment stands between two steps.
        self.between_steps = False

    def seated(self, env: TextEnv) -> None:
        self.env = env

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """See `InferenceEngine.generate`."""
        self.between_steps = True
        try:
            return await self._engine.generate(prompt_ids, sampling)
        finally:
            self.between_steps = False


@dataclass(eq=False)
class Group:
    """The attempts at one task."""

    id: str
    task: Task
    #: Those that nobody plays yet, parked ones of an earlier process among them.
    pending: list[Episode] = field(default_factory=list)
    #: By id.
    playing: dict[str, Seat] = field(default_factory=dict)
    #: Judged; failed ones, too.
    finished: dict[str, Trajectory] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return not self.pending and not self.playing

    @property
    def unfinished(self) -> list[Episode]:
        return [*self.pending, *(seat.episode for seat in self.playing.values())]

    @property
    def oldest_version(self) -> int | None:
        """The oldest weights that any of its tokens was sampled from; None without tokens."""
        versions = [episode.oldest_version for episode in self.unfinished]
        versions += [version for t in self.finished.values() for version in sampled_versions(t)]
        return min((version for version in versions if version != NO_WEIGHT_VERSION), default=None)

    def members(self) -> list[Trajectory]:
        """The finished ones, in the order of their attempts."""
        return sorted(self.finished.values(), key=lambda t: int(t.id.rpartition("-")[2]))


def sampled_versions(trajectory: Trajectory) -> list[int]:
    segments = (segment for line in trajectory.lines for segment in line.segments)
    return [segment.weight_version for segment in segments if segment.sampled]


def learnable(members: Sequence[Trajectory]) -> list[Trajectory]:
    """Those of a group to learn from: not failed, and with something sampled; a group needs two."""
    found = [member for member in members if not member.failed and member.num_sampled]
    return found if len(found) > 1 else []


def rewards_of(members: Sequence[Trajectory], config: Config, step: int) -> list[float]:
    """What learnable members of a group are rewarded with at this step; see `shaped_rewards`."""
    rewards = [member.reward for member in members]
    lengths = [member.num_sampled for member in members]
    return shaped_rewards(rewards, lengths, [member.stop_reason for member in members], config.budget, step)


def teaches(members: Sequence[Trajectory], config: Config, step: int) -> bool:
    """Whether a group has a gradient: two members to learn from whose rewards differ."""
    found = learnable(members)
    return bool(found) and not is_uniform(rewards_of(found, config, step))
