"""A run without Ray, torch and vLLM: the real driver with a worker whose weights are one number."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from k2rl import composition, launch
from k2rl.errors import RunError
from k2rl.models.hub import shapes_fingerprint
from k2rl.preflight import Preflight, preflight
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.rollouts.pool import Pool
from k2rl.run import Run
from k2rl.tracking.tracker import Tracker
from k2rl.training.checkpoint import (
    FORMAT,
    About,
    checkpoints,
    file_records,
    replaced_folder,
    write_about,
)
from k2rl.types import Segment, Trajectory, Verdict
from k2rl.workers.handle import WorkerLostError
from k2rl.workers.recovery import Recovery

OVERRIDES = [
    "experiment=tiny",
    "ptx=none",
    "warm_start.steps=2",
    "warm_start.demos_per_step=1",
    "tracking.live=off",
    "tracking.tensorboard=false",
]
WARM_START_GAIN = 100
#: Episodes that are over when something happens in a rollout.
FINISHED_AT_DEATH = 3
STATE_FILE = "state"

Trouble = Callable[["FakeWorker"], Awaitable[None]]


async def interrupt(worker: FakeWorker) -> None:
    """Ctrl-C, noticed by the event loop before the call goes on."""
    signal.raise_signal(signal.SIGINT)
    for _ in range(10):
        await asyncio.sleep(0)


async def fail(worker: FakeWorker) -> None:
    raise RunError("something broke")


async def vanish(worker: FakeWorker) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def die(worker: FakeWorker) -> None:
    worker.lost = True
    raise WorkerLostError("worker 0 died; last lines of its log:\nnothing")


@dataclass
class FakeWorker:
    """Trains by counting. `trouble` says what happens in which call, such as `policy_step 2`."""

    about: About
    trouble: dict[str, Trouble] = field(default_factory=dict)
    weights: int = 0
    lost: bool = False
    #: The checkpoint being written: its folder, and the weights as they were.
    saving: tuple[Path, int] | None = None
    calls: list[str] = field(default_factory=list)
    #: Episodes of each rollout.
    played: list[int] = field(default_factory=list)

    async def happen(self, name: str) -> None:
        call = f"{name} {1 + Counter(made.split()[0] for made in self.calls)[name]}"
        self.calls.append(call)
        await asyncio.sleep(0)
        if call in self.trouble:
            await self.trouble.pop(call)(self)

    async def policy_step(self, *_: object) -> dict[str, float]:
        await self.happen("policy_step")
        self.weights += 1
        return {"loss": 0.5}

    async def sft_step(self, batch: object, lr: float) -> dict[str, float]:
        await self.happen("sft_step")
        self.weights += WARM_START_GAIN
        return {"loss": 0.5}

    async def nll(self, texts: object) -> dict[str, float]:
        await self.happen("nll")
        return {"nll": 1.0 / (1 + self.weights), "tokens": 9.0}

    async def reset_optimizer(self, lr: float) -> None:
        await self.happen("reset_optimizer")

    async def publish(self) -> dict[str, float]:
        await self.happen("publish")
        return {"version": float(self.weights)}

    @property
    def version(self) -> int:
        return self.weights

    async def weights_digest(self) -> str:
        return str(self.weights)

    async def logprob_gap(self, *_: object) -> dict[str, float]:
        await self.happen("logprob_gap")
        return {"mean": 0.0, "max": 0.0, "tokens": 1.0}

    async def save(self, folder: Path) -> None:
        assert self.saving is None
        await self.happen("save")
        self.saving = folder, self.weights

    async def saved(self) -> None:
        """A slow disk: nothing is there before somebody waits for it."""
        assert self.saving is not None
        (folder, weights), self.saving = self.saving, None
        await self.happen("saved")
        with replaced_folder(folder) as target:
            (target / STATE_FILE).write_text(str(weights))
            files = file_records([target / STATE_FILE])
            write_about(target, msgspec.structs.replace(self.about, files=files))

    async def load(self, folder: Path) -> None:
        await self.happen("load")
        self.weights = int((folder / STATE_FILE).read_text())

    async def save_pretrained(self, folder: Path) -> None:
        await self.happen("save_pretrained")
        with replaced_folder(folder) as target:
            (target / "weights").write_text(str(self.weights))

    async def watch(self) -> None:
        await asyncio.Event().wait()


class FakeScheduler:
    """Every episode is played at once and scored; in a step's, something may happen after the first few."""

    compares = False

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self._begun = self._open = 0

    async def run(self, attempts: Sequence[Attempt], progress: object) -> list[Trajectory]:
        """An evaluation."""
        self._worker.played.append(len(attempts))
        await self._worker.happen("rollout")
        return [_scored(attempt, number) for number, attempt in enumerate(attempts)]

    async def play(self, episode: Episode, *_: object) -> Trajectory:
        """One of the episodes of a step, all of which begin at the same time."""
        if not self._open:
            self._begun, self._happened = 0, asyncio.Event()
        number = self._begun
        self._begun += 1
        self._open += 1
        await asyncio.sleep(0)
        if number == FINISHED_AT_DEATH:
            self._worker.played.append(self._begun)
            await self._worker.happen("rollout")
            self._happened.set()
        elif number > FINISHED_AT_DEATH:
            await self._happened.wait()
        self._open -= 1
        return _scored(episode.attempt, number)


def _scored(attempt: Attempt, number: int) -> Trajectory:
    return Trajectory(
        attempt.id,
        attempt.group_id,
        attempt.task,
        attempt.temperature,
        [Segment((5, 6), sampled=False), Segment((7,), True, (-0.5,), 0)],
        verdict=Verdict.scored(float(number % 2)),
    )


@dataclass
class Story:
    """One start of a run in a folder of its own, and what became of it."""

    prepared: Preflight
    run_dir: Path
    monkeypatch: pytest.MonkeyPatch
    recorded: int = 0
    workers: list[FakeWorker] = field(default_factory=list)

    def play(
        self,
        trouble: dict[str, Trouble] | None = None,
        checkpoint_every: int = 1,
        resume: bool = False,
        keep: int = 1,
        restarts: int = 0,
    ) -> FakeWorker:
        """Run to the end; raises what the run raises. `self.worker` is the last worker, also afterwards.

        The first one has the trouble; those that take its place have what it leaves.
        """
        prepared = replace(self.prepared, config=copy.deepcopy(self.prepared.config))
        prepared.config.train.checkpoint_every = checkpoint_every
        prepared.config.train.keep_checkpoints = keep
        prepared.config.recovery.max_restarts = restarts
        prepared.config.resume = str(self.run_dir) if resume else None
        shapes = shapes_fingerprint(prepared.model_path)
        about, left = About(FORMAT, {}, "muon", "tiny", shapes), dict(trouble or {})
        self.workers = []

        @asynccontextmanager
        async def started(*arguments: Any, recovery: Recovery, **_: object) -> AsyncIterator[Run]:
            config, step = prepared.config, arguments[2]
            self.workers.append(FakeWorker(about, left))
            scheduler = FakeScheduler(self.worker)
            store = launch._store(config, self.run_dir)
            pool = Pool(config, scheduler, self.worker, store, prepared.train_tasks)  # type: ignore[arg-type]
            with Tracker(self.run_dir, config.tracking, config.train.steps, step) as tracker:
                run = Run(
                    config,
                    self.run_dir,
                    tracker,
                    self.worker,  # type: ignore[arg-type]
                    prepared,
                    scheduler,  # type: ignore[arg-type]
                    pool,
                    prepared.corpus(),
                    finished_steps=step or 0,
                )
                with recovery.begun(tracker.note, lambda: run.finished_steps):
                    try:
                        yield run
                    finally:
                        await pool.close()

        self.monkeypatch.setattr(launch, "started", started)
        launch.execute(prepared, self.run_dir, self._record)
        return self.worker

    @property
    def worker(self) -> FakeWorker:
        return self.workers[-1]

    def _record(self) -> None:
        self.recorded += 1

    @property
    def saved(self) -> dict[int, int]:
        """The weights in each whole checkpoint, by step."""
        return {step: int((folder / STATE_FILE).read_text()) for step, folder in checkpoints(self.run_dir)}


@pytest.fixture(scope="session")
def prepared() -> Preflight:
    return preflight(composition.compose(OVERRIDES))


@pytest.fixture
def story(prepared: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Story(prepared, tmp_path / "run", monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
