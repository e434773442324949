"""A started run: what the loop works with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from k2rl.checkpointed import CheckpointedRun
from k2rl.critic import Critic
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.results import EvaluationResult, summarise
from k2rl.models.hub import shapes_fingerprint
from k2rl.preflight import Preflight
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.recording import (
    Source,
    playing_settings_of,
    read_recording,
    recorded_steps,
    settings_of,
    write_recording,
)
from k2rl.rollouts.scheduler import RolloutScheduler, check_failures
from k2rl.tracking import phases
from k2rl.training.supervised import Corpus
from k2rl.types import Trajectory

logger = logging.getLogger(__name__)


@dataclass
class Rollouts:
    """What a step learns from."""

    trajectories: list[Trajectory]
    #: Of the weights that the step began with; tokens of others are older.
    version: int
    #: Of the sampling; empty if the step was recorded before.
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Run(CheckpointedRun):
    """A started run: what the loop works with."""

    prepared: Preflight
    scheduler: RolloutScheduler
    pool: Pool
    ptx: Corpus
    #: Where the policy judges itself.
    critic: Critic | None = None
    #: Mean reward of each finished step.
    rewards: list[float] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        return self.config.debug.mode != "rollout_only"

    @property
    def serves(self) -> bool:
        """Whether there is an inference engine."""
        return self.config.debug.mode != "train_only"

    async def recorded(self, step: int) -> Rollouts | None:
        """The step's trajectories, if they need not be sampled.

        They are another run's with `debug=train_only`. Else they are those that this run had recorded, but
        not learned from and saved, before it was stopped: if they are of the weights and settings of now.
        """
        if not self.serves:
            found = read_recording(self.rollouts_folder, step)
            return Rollouts(found.trajectories, found.version)
        if step not in recorded_steps(self.run_dir):
            return None
        try:
            recording = read_recording(self.run_dir, step)
        except ConfigError as error:
            logger.warning("the rollouts of step %d are sampled again", step, exc_info=error)
            self.pool.forget()
            return None
        source = await self._source()
        if Source(recording.model, recording.settings, recording.weights, recording.version) != source:
            self.pool.forget()
            return None
        self.tracker.note(f"step {step}: its rollouts were recorded with these weights and are used again")
        self.pool.settle(recording.trajectories)
        return Rollouts(recording.trajectories, recording.version)

    async def play(self, step: int, temperature: float) -> tuple[Rollouts, bool]:
        """The step's rollouts, and whether all of them are new.

        Each is in the store as it ends: what a run had finished before it was stopped, or its workers died,
        is not played again; nor are the first parts of episodes that it had parked.
        """
        source = await self._source()
        model = f"{source.model} {playing_settings_of(self.config)}"
        finished = await self.pool.begin(
            model if self.pool.parks else f"{model} {source.weights} {source.settings} step {step}"
        )
        if finished:
            self.tracker.note(f"step {step}: {finished} of its rollouts were finished before")
        try:
            harvest = await self.pool.play(step, temperature, source.version, self.tracker.progress)
        except ConfigError as error:  # too late to be wrong input: the first step's tasks were there
            raise RunError(f"step {step}: {error}") from error
        if self.config.tracking.record_rollouts:
            write_recording(self.run_dir, step, source, harvest.trajectories)
        self.pool.settle(harvest.trajectories)
        return Rollouts(harvest.trajectories, source.version, harvest.metrics), not finished

    @property
    def rollouts_folder(self) -> Path:
        """Of the run that has recorded the rollouts to train on, with `debug=train_only`."""
        return Path(self.config.debug.rollouts or "").expanduser()

    async def _source(self) -> Source:
        model = shapes_fingerprint(self.prepared.model_path)
        digest = await self.worker.weights_digest()
        return Source(model, settings_of(self.config), digest, self.worker.version)

    async def evaluate(self, name: str) -> EvaluationResult:
        """Greedy episodes on the held-out tasks; saved as `evaluations/<name>.json`."""
        attempts = [
            Attempt(f"{name}-{task.id}", task.id, task, temperature=0.0, seed=self.config.seed)
            for task in self.prepared.eval_tasks
        ]
        with self.tracker.phase(phases.EVALUATE, self.finished_steps):
            trajectories = await self.scheduler.run(attempts, self.tracker.progress)
        check_failures(trajectories, self.config.rollout.max_failed_share, f"evaluation {name}")
        result = summarise(name, self.finished_steps, trajectories)
        self.tracker.evaluation(result)
        return result

    async def after_step(self, step: int) -> None:
        """Checkpoint and evaluate when it is time."""
        train = self.config.train
        if self.trains:
            await self.checkpoint_if_due(step)
        due = self.trains and self.serves and train.eval_every and step % train.eval_every == 0
        if due and step < train.steps:
            await self.evaluate(f"step_{step}")
