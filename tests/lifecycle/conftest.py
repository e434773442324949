"""A run without Ray, torch and vLLM: the real driver with a worker whose weights are one number."""

from __future__ import annotations

import asyncio
import copy
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
from k2rl.preflight import Preflight, preflight
from k2rl.rollouts.episode import Attempt
from k2rl.run import Run
from k2rl.tracking.tracker import Tracker
from k2rl.training.checkpoint import FORMAT, About, file_records, replaced_folder, write_about
from k2rl.training.supervised import PTXCorpus
from k2rl.types import Segment, Trajectory, Verdict

OVERRIDES = [
    "experiment=tiny",
    "ptx=none",
    "warm_start.steps=2",
    "warm_start.demos_per_step=1",
    "tracking.live=off",
    "tracking.tensorboard=false",
]
WARM_START_GAIN = 100
STATE_FILE = "state"

Trouble = Callable[["FakeWorker"], Awaitable[None]]


async def interrupt(worker: FakeWorker) -> None:
    """Ctrl-C, noticed by the event loop before the call goes on."""
    signal.raise_signal(signal.SIGINT)
    for _ in range(10):
        await asyncio.sleep(0)


async def fail(worker: FakeWorker) -> None:
    raise RunError("something broke")


async def die(worker: FakeWorker) -> None:
    worker.lost = True
    raise RunError("worker 0 died")


@dataclass
class FakeWorker:
    """Trains by counting. `trouble` says what happens in which call, such as `policy_step 2`."""

    about: About
    trouble: dict[str, Trouble] = field(default_factory=dict)
    weights: int = 0
    lost: bool = False
    calls: list[str] = field(default_factory=list)

    async def happen(self, name: str) -> None:
        call = f"{name} {1 + Counter(made.split()[0] for made in self.calls)[name]}"
        self.calls.append(call)
        await asyncio.sleep(0)
        if call in self.trouble:
            await self.trouble[call](self)

    async def policy_step(self, *_: object) -> dict[str, float]:
        await self.happen("policy_step")
        self.weights += 1
        return {"loss": 0.5}

    async def sft_step(self, batch: object) -> dict[str, float]:
        await self.happen("sft_step")
        self.weights += WARM_START_GAIN
        return {"loss": 0.5}

    async def reset_optimizer(self, lr: float) -> None:
        await self.happen("reset_optimizer")

    async def publish(self) -> dict[str, float]:
        await self.happen("publish")
        return {"version": float(self.weights)}

    async def weights_digest(self) -> str:
        return str(self.weights)

    async def logprob_gap(self, *_: object) -> dict[str, float]:
        await self.happen("logprob_gap")
        return {"mean": 0.0, "max": 0.0, "tokens": 1.0}

    async def save(self, folder: Path) -> None:
        await self.happen("save")
        with replaced_folder(folder) as target:
            (target / STATE_FILE).write_text(str(self.weights))
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


@dataclass
class FakeScheduler:
    """Every episode is played at once and scored."""

    worker: FakeWorker

    async def run(self, attempts: Sequence[Attempt], progress: object) -> list[Trajectory]:
        await self.worker.happen("rollout")
        return [
            Trajectory(
                attempt.id,
                attempt.group_id,
                attempt.task,
                attempt.temperature,
                [Segment((5, 6), sampled=False), Segment((7,), sampled=True, logprobs=(-0.5,))],
                verdict=Verdict.scored(float(number % 2)),
            )
            for number, attempt in enumerate(attempts)
        ]


@dataclass
class Story:
    """One start of a run in a folder of its own, and what became of it."""

    prepared: Preflight
    run_dir: Path
    monkeypatch: pytest.MonkeyPatch
    recorded: int = 0

    def play(
        self,
        trouble: dict[str, Trouble] | None = None,
        checkpoint_every: int = 1,
        resume: bool = False,
        keep: int = 1,
    ) -> FakeWorker:
        """Run to the end; raises what the run raises. `self.worker` is the worker, also afterwards."""
        prepared = replace(self.prepared, config=copy.deepcopy(self.prepared.config))
        prepared.config.train.checkpoint_every = checkpoint_every
        prepared.config.train.keep_checkpoints = keep
        prepared.config.resume = str(self.run_dir) if resume else None
        shapes = launch.shapes_fingerprint(prepared.model_path)
        self.worker = FakeWorker(About(FORMAT, {}, "muon", "tiny", shapes), trouble or {})

        @asynccontextmanager
        async def started(*arguments: Any, **_: object) -> AsyncIterator[Run]:
            config, step = prepared.config, arguments[2]
            with Tracker(self.run_dir, config.tracking, config.train.steps, step) as tracker:
                yield Run(
                    config,
                    prepared,
                    self.run_dir,
                    tracker,
                    self.worker,  # type: ignore[arg-type]
                    FakeScheduler(self.worker),  # type: ignore[arg-type]
                    PTXCorpus(prepared.ptx, config.ptx.sequences_per_step, config.seed),
                    step or 0,
                )

        self.monkeypatch.setattr(launch, "started", started)
        launch.execute(prepared, self.run_dir, self._record)
        return self.worker

    def _record(self) -> None:
        self.recorded += 1

    @property
    def saved(self) -> dict[int, int]:
        """The weights in each whole checkpoint, by step."""
        return {
            step: int((folder / STATE_FILE).read_text()) for step, folder in launch.checkpoints(self.run_dir)
        }


@pytest.fixture(scope="session")
def prepared() -> Preflight:
    return preflight(composition.compose(OVERRIDES))


@pytest.fixture
def story(prepared: Preflight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Story(prepared, tmp_path / "run", monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
