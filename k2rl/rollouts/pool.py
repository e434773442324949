"""The groups in play: a step takes those that are finished, the others are dropped, or parked for the next.

A parked episode stays as it is: its environment is alive, a call of it under way goes on, and when it wants
the engine it waits at the gate until the next step opens it. For a resumed run it is in the store as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import cast

from envs.base import TextEnv
from k2rl.config import Config
from k2rl.inference.engine import InterruptibleEngine
from k2rl.rollouts.curriculum import prioritised
from k2rl.rollouts.gate import Gate, Pause
from k2rl.rollouts.groups import Group, Seat, attempts, drawn_at
from k2rl.rollouts.history import History
from k2rl.rollouts.hosting import call
from k2rl.rollouts.iteration import Draw, Iteration, staleness
from k2rl.rollouts.order import Queue
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.rollouts.store.base import TrajectoryStore, verdict_key
from k2rl.types import Task, Trajectory, Verdict
from rubrics.deadline import MissedDeadlineError, within

#: This process, as the store knows it. A run's folder has one owner, so that what it held before is its own.
HOLDER = "driver"
LEASE_S = 1e9
ALL = 10**9
SNAPSHOT_DEADLINE_S = 30.0
#: Requests with the engine, as a multiple of what it computes at once: the next ones are always there.
REQUESTS_AHEAD = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Harvest:
    """What a step has to learn from."""

    #: By group, in the order in which the groups were drawn.
    trajectories: list[Trajectory]
    metrics: dict[str, float]


class Pool:
    """Plays groups across steps; see `RolloutConfig` for what may be asked of it."""

    def __init__(
        self,
        config: Config,
        scheduler: RolloutScheduler,
        engine: InterruptibleEngine,
        store: TrajectoryStore,
        draw: Draw,
        history: History | None = None,
    ) -> None:
        self._config = config
        self._rollout = config.rollout
        self._scheduler = scheduler
        replicas = config.cluster.workers // config.inference.tensor_parallel
        self._gate = Gate(engine, REQUESTS_AHEAD * config.inference.max_num_seqs * replicas)
        self._store = store
        self._history = history or History(config)
        self._draw = prioritised(draw, config.rollout, config.seed, self._history.success)
        self._queue = Queue(self._history.lengths, self._rollout.longest_first)
        #: In play, by id: those that are not over, and those that are.
        self._open: dict[str, Group] = {}
        self._whole: dict[str, Group] = {}
        self._tasks: dict[asyncio.Task[None], Group] = {}
        self._by_kind: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._lost: BaseException | None = None
        self._parked: set[str] = set()
        self._source: str | None = None
        self._wasted = 0
        #: Episodes that have ended, ever.
        self.played = 0

    @property
    def parks(self) -> bool:
        return self._rollout.surplus == "park"

    async def begin(self, source: str) -> int:
        """Take up what the store has of this source; returns how many episodes were finished before.

        What is in play of another source is dropped. To be called before each step.
        """
        if source == self._source:
            return 0
        await self._abandon(self.groups)
        self._store.begin(source)
        self._store.release(HOLDER)
        unfinished = self._store.lease(ALL, HOLDER, LEASE_S)
        finished = self._store.take(ALL, HOLDER, LEASE_S)
        groups: dict[str, Group] = {}
        for episode in unfinished:
            attempt = episode.attempt
            group = groups.setdefault(attempt.group_id, Group(attempt.group_id, attempt.task))
            group.pending.append(episode)
            if episode.trajectory is not None:
                self._parked.add(attempt.id)
        for trajectory in finished:
            group = groups.setdefault(trajectory.group_id, Group(trajectory.group_id, trajectory.task))
            group.finished[trajectory.id] = trajectory
        for group in sorted(groups.values(), key=lambda group: drawn_at(group.id)):
            (self._whole if group.whole else self._open)[group.id] = group
            self._queue.push(group)
        self._source = source
        return len(finished)

    async def play(
        self, step: int, temperature: float, version: int, progress: Callable[[int, int], None]
    ) -> Harvest:
        """Roll out until the step has what it wants; then every episode waits, or is dropped.

        Args:
            step: number of it.
            temperature: of the groups that it begins.
            version: of the weights that the engine serves.
            progress: told how many episodes have ended, and how many a step has.

        Raises:
            RunError, EngineDeadError: the engine is lost.
            ConfigError: there are no tasks.
        """
        iteration = Iteration(self._config, self, self._draw, step, temperature, version)
        self._gate.open()
        began, busy, tokens = time.monotonic(), self._gate.busy_s(), self._gate.tokens
        self._wasted, resumed = 0, len(self._parked)
        while not await iteration.advance(time.monotonic() - began, self._gate.tokens - tokens):
            progress(*iteration.progress)
            self._changed.clear()
            left = self._rollout.step_s - (time.monotonic() - began) if self._rollout.step_s else None
            changed = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait({changed}, timeout=left if left is not None and left > 0 else None)
            changed.cancel()
            if self._lost is not None:
                raise self._lost
        progress(*iteration.progress)
        seconds = time.monotonic() - began
        metrics = {
            "rollout/engine_busy_share": (self._gate.busy_s() - busy) / seconds if seconds else 0.0,
            "rollout/groups_drawn": float(iteration.drawn),
            "rollout/resumed": float(resumed),
        }
        taken = iteration.taken()
        for group in taken:
            del self._whole[group.id]
        await self._pause()
        trajectories = [member for group in taken for member in group.members()]
        metrics |= self._staleness(trajectories, version) | {
            "rollout/parked": float(len(self._parked)),
            "rollout/wasted_tokens": float(self._wasted),
            "rollout/sampled_tokens": float(self._gate.tokens - tokens),
        }
        return Harvest(trajectories, metrics)

    def forget(self) -> None:
        """Before `begin`: drop all that the store has, since the steps that it came from are played again."""
        self._store.begin("")

    def settle(self, trajectories: list[Trajectory]) -> None:
        """Let the store know that a step has these for good: they are recorded, or learned from."""
        for trajectory in trajectories:
            self._history.add(trajectory)
        self._store.take(ALL, HOLDER, LEASE_S)
        self._store.ack([t.id for t in trajectories if not t.failed], HOLDER)
        self._store.drop([t.id for t in trajectories if t.failed])

    async def close(self) -> None:
        """End all episodes and close their environments; what is in the store stays there."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._store.close()

    # What an iteration does with it.

    @property
    def open(self) -> list[Group]:
        """Those that are not over."""
        return list(self._open.values())

    @property
    def whole(self) -> list[Group]:
        return sorted(self._whole.values(), key=lambda group: drawn_at(group.id))

    @property
    def groups(self) -> list[Group]:
        return [*self._open.values(), *self._whole.values()]

    async def start_group(self, task: Task, index: int, step: int, temperature: float) -> bool:
        """Put a group into play, unless it is there already."""
        found = attempts(task, index, self._rollout.group_size, self._config.seed, step, temperature)
        group = Group(found[0].group_id, task)
        if self._in_play(group):
            return False
        self._store.add(found)
        group.pending = self._store.lease(len(found), HOLDER, LEASE_S)
        self._open[group.id] = group
        self._queue.push(group)
        return True

    def _in_play(self, group: Group) -> bool:
        return group.id in self._open or group.id in self._whole

    def fill(self) -> None:
        """Seat waiting episodes while there is room."""
        while len(self._tasks) < self._rollout.max_concurrent:
            group = self._queue.pop(self._has_room)
            if group is None:
                return
            episode = group.pending.pop(0)
            if group.pending:
                self._queue.push(group)
            kind = group.task.kind
            self._by_kind[kind] = self._by_kind.get(kind, 0) + 1
            seat = group.playing[episode.attempt.id] = Seat(episode, self._gate)
            task = asyncio.ensure_future(self._play(group, seat))
            self._tasks[task] = group
            task.add_done_callback(self._played)

    def hurry(self, groups: list[Group]) -> None:
        """Let these come first."""
        self._queue.hurry(groups)

    def _has_room(self, group: Group) -> bool:
        limit = self._rollout.max_per_kind.get(group.task.kind)
        return limit is None or self._by_kind.get(group.task.kind, 0) < limit

    async def _play(self, group: Group, seat: Seat) -> None:
        trajectory = await self._scheduler.play(
            seat.episode,
            seat,
            self._judge if self._config.rubric.cache_verdicts else None,
            seat.seated,
            self._gate.closed_s,
        )
        if not self._in_play(group):
            return
        ended = [trajectory]
        if self._scheduler.compares:
            ended = [*group.finished.values(), trajectory]
            if len(ended) == self._rollout.group_size:
                await self._scheduler.judge_group(sorted(ended, key=lambda t: t.id))
                if not self._in_play(group):
                    return
            else:
                ended = []  # none is over before all are: what a crash leaves of a group is played again
        self._store.finish([t for t in ended if not t.failed])
        group.finished[trajectory.id] = trajectory

    def _played(self, task: asyncio.Task[None]) -> None:
        group = self._tasks.pop(task)
        self._by_kind[group.task.kind] -= 1
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._lost = self._lost or error
        over = [id for id in group.playing if id in group.finished]
        for id in over:
            del group.playing[id]
            self._parked.discard(id)
        if group.whole and self._open.pop(group.id, None) is not None:
            self._whole[group.id] = group
        self.played += len(over)
        self._changed.set()

    async def _judge(self, trajectory: Trajectory) -> Verdict | None:
        rubric = f"{self._config.rubric.id} {self._config.rubric.kwargs} {self._config.env.id}"
        key = verdict_key(rubric, trajectory)
        kept = self._store.verdict(key)
        if kept is None:
            kept = await self._scheduler.judge(trajectory)
            if kept is not None:
                self._store.keep_verdict(key, kept)
        return kept

    async def _pause(self) -> None:
        """Close the gate; the surplus is parked or dropped."""
        await self._gate.close("generation" if not self.parks else cast("Pause", self._rollout.pause))
        if self._lost is not None:
            raise self._lost
        if not self.parks:
            await self._abandon(self.groups)
            return
        begun = [episode for group in self.open for episode in group.unfinished if episode.trajectory]
        self._parked = {episode.attempt.id for episode in begun}
        await asyncio.gather(
            *(_take_snapshot(seat) for group in self.open for seat in group.playing.values())
        )
        self._store.park(begun, HOLDER, LEASE_S)

    async def _abandon(self, groups: list[Group]) -> None:
        """Drop groups, with all that was sampled for them."""
        for group in groups:
            self._open.pop(group.id, None)
            self._whole.pop(group.id, None)
            self._queue.remove(group)
            self._wasted += sum(episode.num_sampled for episode in group.unfinished)
            self._wasted += sum(trajectory.num_sampled for trajectory in group.finished.values())
        tasks = [task for task, group in self._tasks.items() if not self._in_play(group)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        ids = [episode.attempt.id for group in groups for episode in group.unfinished]
        ids += [id for group in groups for id in group.finished]
        self._parked -= set(ids)
        if ids:
            self._store.drop(ids)

    def _staleness(self, trajectories: list[Trajectory], version: int) -> dict[str, float]:
        by_token = [
            staleness(version, segment.weight_version, self._config)
            for trajectory in trajectories
            for segment in trajectory.segments
            if segment.sampled
            for _ in segment.token_ids
        ]
        return {
            "rollout/staleness_mean": fmean(by_token) if by_token else 0.0,
            "rollout/staleness_max": float(max(by_token, default=0)),
        }


async def _take_snapshot(seat: Seat) -> None:
    """Where the environment gives one; it is asked only between two steps of it."""
    env = seat.env
    if env is None or not seat.between_steps or type(env).snapshot is TextEnv.snapshot:
        return
    try:
        seat.episode.snapshot = await within(SNAPSHOT_DEADLINE_S, call(env.snapshot))
    # Plug-in code may raise anything; the episode can be brought back by its actions.
    except (Exception, MissedDeadlineError) as error:
        logger.warning("no snapshot of episode %s", seat.episode.attempt.id, exc_info=error)
