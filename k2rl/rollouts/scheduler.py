"""Many episodes at once: bounded, deadlined, judged as they finish."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from envs.base import TextEnv
from k2rl.config import Config
from k2rl.errors import RunError
from k2rl.inference.engine import EngineDeadError, InferenceEngine
from k2rl.models.chat import ChatTemplate
from k2rl.objective.budget import budget_for
from k2rl.rollouts.episode import Attempt, Episode, EpisodeLimits
from k2rl.rollouts.gateway.server import Gateway
from k2rl.rollouts.hosting import hosted
from k2rl.rollouts.judging import Judging
from k2rl.rollouts.playing import play_episode
from k2rl.types import Task, Trajectory, Verdict
from rubrics.base import Rubric, judge_safely
from rubrics.deadline import MissedDeadlineError
from rubrics.groups import judge_group_safely

Judge = Callable[[Trajectory], Coroutine[Any, Any, Verdict | None]]
"""None: it is judged later, with the others of its group."""

logger = logging.getLogger(__name__)


class RolloutScheduler:
    """Plays and judges episodes with one engine, environment id and rubric."""

    def __init__(
        self,
        config: Config,
        engine: InferenceEngine,
        chat: ChatTemplate,
        make_env: Callable[[], TextEnv],
        rubric: Rubric,
        gateway: Gateway | None = None,
        alone: Rubric | None = None,
    ) -> None:
        """`alone` judges episodes that have no group, where `rubric` compares."""
        self._config = config
        self._engine = engine
        self._chat = chat
        self._make_env = make_env
        self._rubric = rubric
        self._gateway = gateway
        self._alone = alone or rubric

    async def run(
        self,
        attempts: Sequence[Attempt],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Trajectory]:
        """Play all attempts; returns judged trajectories in the order of the attempts.

        Raises:
            RunError, EngineDeadError: the engine is lost; the other episodes are cancelled.
        """
        slots = asyncio.Semaphore(self._config.rollout.max_concurrent)
        done = 0
        deadline_s = self._config.rubric.deadline_s
        judging = Judging(self._rubric, self._alone, deadline_s, (attempt.group_id for attempt in attempts))

        async def play(attempt: Attempt) -> Trajectory:
            nonlocal done
            async with slots:
                trajectory = await self.play(Episode(attempt), self._engine, judging.at_once)
            # Outside of the slots: the last of a group would wait for the first.
            await judging.with_its_group(trajectory)
            done += 1
            progress(done, len(attempts))
            return trajectory

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(play(attempt)) for attempt in attempts]
        except* (RunError, EngineDeadError) as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def play(
        self,
        episode: Episode,
        engine: InferenceEngine,
        judge: Judge | None = None,
        seated: Callable[[TextEnv], None] = lambda env: None,
        excused_s: Callable[[], float] = lambda: 0.0,
    ) -> Trajectory:
        """Play an episode, or go on with it, and judge it.

        An environment (its constructor and `close()` too) or judge that raises, and an episode past its
        deadline, give a trajectory whose verdict is failed with the reason.

        Args:
            episode: is kept up to date.
            engine: that samples its turns.
            judge: instead of the rubric.
            seated: is told the environment once there is one.
            excused_s: a clock of the time that does not count against the episode's deadline.

        Raises:
            RunError, EngineDeadError: the engine is lost.
        """
        attempt, deadline = episode.attempt, self._config.rollout.episode_deadline_s

        def use(env: TextEnv) -> Coroutine[Any, Any, Trajectory]:
            seated(env)
            limits = self._limits(attempt.task)
            return play_episode(episode, env, engine, self._chat, limits, self._gateway)

        try:
            trajectory = await hosted(self._make_env, use, deadline, excused_s)
        except (RunError, EngineDeadError):
            raise
        except MissedDeadlineError as error:
            where = "; ".join(getattr(error, "__notes__", ["it waited for the model, or for async code"]))
            return _failed(attempt, f"not over after rollout.episode_deadline_s={deadline:g} s: {where}")
        # Plug-in code may raise anything; whatever it is, it is this episode's failure and not a score.
        except Exception as error:
            logger.warning("episode %s failed", attempt.id, exc_info=error)
            return _failed(attempt, f"{type(error).__name__}: {error}")
        if (verdict := await (judge or self.judge)(trajectory)) is not None:
            trajectory.verdict = verdict
        return trajectory

    @property
    def compares(self) -> bool:
        """Whether the rubric compares the responses to a task: then `judge` gives none of them a verdict."""
        return self._rubric.needs_group

    async def judge(self, trajectory: Trajectory) -> Verdict | None:
        """The rubric's verdict, or a failed one; None if it compares."""
        if self.compares:
            return None
        return await judge_safely(self._rubric, trajectory, self._config.rubric.deadline_s)

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> None:
        """Give all responses to a task their verdicts."""
        deadline_s = self._config.rubric.deadline_s
        for trajectory, verdict in zip(
            trajectories, await judge_group_safely(self._rubric, trajectories, deadline_s), strict=True
        ):
            trajectory.verdict = verdict

    def _limits(self, task: Task) -> EpisodeLimits:
        rollout = self._config.rollout
        return EpisodeLimits(
            max_turns=self._config.env.max_turns,
            max_tokens_per_turn=rollout.max_tokens_per_turn,
            token_budget=budget_for(task.kind, self._config.budget),
            max_model_len=self._config.inference.max_model_len,
            repeat_size=rollout.repeat_size,
            repeat_count=rollout.repeat_count,
        )


def _failed(attempt: Attempt, reason: str) -> Trajectory:
    return Trajectory(
        attempt.id,
        attempt.group_id,
        attempt.task,
        attempt.temperature,
        stop_reason="failed",
        verdict=Verdict.failed(f"episode {attempt.id}: {reason}"),
    )


def check_failures(trajectories: Sequence[Trajectory], max_share: float, where: str) -> None:
    """Stop a run whose episodes fail too often: their scores would say nothing.

    Raises:
        RunError: with the share and the first reason.
    """
    failed = [trajectory for trajectory in trajectories if trajectory.failed]
    if not failed or len(failed) <= max_share * len(trajectories):
        return
    first = failed[0].verdict.failure if failed[0].verdict else "no verdict"
    raise RunError(
        f"{where}: {len(failed)} of {len(trajectories)} episodes failed, more than "
        f"rollout.max_failed_share={max_share:g} allows; first: {first}"
    )
