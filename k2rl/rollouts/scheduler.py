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
from k2rl.rollouts.episode import Attempt, EpisodeLimits, run_episode
from k2rl.rollouts.hosting import hosted
from k2rl.rollouts.judging import Judging
from k2rl.types import Task, Trajectory, Verdict
from rubrics.base import Rubric
from rubrics.deadline import MissedDeadlineError

logger = logging.getLogger(__name__)


class RolloutScheduler:
    """Plays and judges batches of episodes with one engine, environment id and rubric."""

    def __init__(
        self,
        config: Config,
        engine: InferenceEngine,
        chat: ChatTemplate,
        make_env: Callable[[], TextEnv],
        rubric: Rubric,
        alone: Rubric | None = None,
    ) -> None:
        """`alone` judges episodes that have no group, where `rubric` compares."""
        self._config = config
        self._engine = engine
        self._chat = chat
        self._make_env = make_env
        self._rubric = rubric
        self._alone = alone or rubric

    async def run(
        self,
        attempts: Sequence[Attempt],
        progress: Callable[[int, int], None] = lambda done, total: None,
        finished: Callable[[Trajectory], None] = lambda trajectory: None,
    ) -> list[Trajectory]:
        """Play all attempts; returns judged trajectories in the order of the attempts.

        Each is handed to `finished` as it ends.

        An environment (its constructor and `close()` too) or judge that raises, and an episode past its
        deadline, give a trajectory whose verdict is failed with the reason.

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
                trajectory = await self._play(attempt)
                if not self._rubric.needs_group:
                    await judging.judge(trajectory)
            if self._rubric.needs_group:
                await judging.judge(trajectory)
            finished(trajectory)
            done += 1
            progress(done, len(attempts))
            return trajectory

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(play(attempt)) for attempt in attempts]
        except* (RunError, EngineDeadError) as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _play(self, attempt: Attempt) -> Trajectory:
        deadline = self._config.rollout.episode_deadline_s

        def episode(env: TextEnv) -> Coroutine[Any, Any, Trajectory]:
            return run_episode(attempt, env, self._engine, self._chat, self._limits(attempt.task))

        try:
            return await hosted(self._make_env, episode, deadline)
        except (RunError, EngineDeadError):
            raise
        except MissedDeadlineError as error:
            where = "; ".join(getattr(error, "__notes__", ["it waited for the model, or for async code"]))
            return _failed(attempt, f"not over after rollout.episode_deadline_s={deadline:g} s: {where}")
        # Plug-in code may raise anything; whatever it is, it is this episode's failure and not a score.
        except Exception as error:
            logger.warning("episode %s failed", attempt.id, exc_info=error)
            return _failed(attempt, f"{type(error).__name__}: {error}")

    def _limits(self, task: Task) -> EpisodeLimits:
        return EpisodeLimits(
            max_turns=self._config.env.max_turns,
            max_tokens_per_turn=self._config.rollout.max_tokens_per_turn,
            token_budget=budget_for(task.kind, self._config.budget),
            max_model_len=self._config.inference.max_model_len,
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
