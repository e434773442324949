"""What the training loop tells about itself, and to whom it goes: files, sinks and the live view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from k2rl.config import TrackingConfig
from k2rl.diagnosis.activity import DRIVER
from k2rl.evaluation.results import EvaluationResult, rewind_results, save_result
from k2rl.tracking import summary
from k2rl.tracking.jsonl import JsonlWriter
from k2rl.tracking.live import LiveView
from k2rl.tracking.metrics import Metrics, MetricsLog, MetricsSink
from k2rl.tracking.samples import visible, write_samples
from k2rl.tracking.sinks import TensorBoardSink, WandbSink
from k2rl.tracking.timeline import Timeline, span, sum_per_phase
from k2rl.tracking.versions import write_versions
from k2rl.types import Trajectory

NOTES = "notes.jsonl"


class _Closeable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closeable)


def _opened(undo: ExitStack, resource: C) -> C:
    undo.callback(resource.close)
    return resource


class Tracker:
    """Follows one run in `run_dir`; steps count from 1, and step 0 is everything before RL.

    `resume_step` is the last step that the resumed run keeps: whatever the folder holds of later
    ones is dropped. `whole_config` is shown by W&B. Use it as a context manager, or call `close` in
    a `finally`: it gives the terminal back.

    Raises:
        ConfigError: if `wandb` is asked for and not installed, or the folder holds another run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        total_steps: int,
        resume_step: int | None = None,
        whole_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._samples_per_step = config.samples_per_step
        with ExitStack() as undo:
            self._log = _opened(undo, MetricsLog(run_dir, resume_step))
            self.timeline = _opened(undo, Timeline(run_dir, resume_step))
            self._notes = _opened(undo, JsonlWriter(run_dir / NOTES, append=resume_step is not None))
            self._sinks: list[MetricsSink] = []
            if config.tensorboard:
                self._sinks.append(_opened(undo, TensorBoardSink(run_dir / "tensorboard", resume_step)))
            if config.wandb:
                wandb = WandbSink(run_dir, config.wandb_project, whole_config or {})
                self._sinks.append(_opened(undo, wandb))
            if resume_step is not None:
                rewind_results(run_dir, resume_step)
                (run_dir / summary.FILE).unlink(missing_ok=True)
            write_versions(run_dir, resumed=resume_step is not None)
            self.live = LiveView(run_dir.name, total_steps, config.live, done_steps=resume_step or 0)
            self.live.start()
            undo.callback(self.live.stop)
            self._close_all = undo.pop_all().close

    @contextmanager
    def phase(self, name: str, step: int = 0) -> Iterator[None]:
        """Time the enclosed block as phase `name` of `step` and show it."""
        self.live.phase(name, step)
        with DRIVER.doing(f"{name} of step {step}"), self.timeline.phase(name, step):
            yield

    def progress(self, done: int, total: int) -> None:
        """How far the current phase has come (episodes, demonstrations, …)."""
        self.live.progress(done, total)

    def step(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Record a finished step; returns its metrics with the seconds of its phases added.

        Those of step 0, where a run has any, are of the model before training, and take no time.
        """
        phases = self.timeline.of_step(step) if step else []
        times = {f"time/{name}_s": seconds for name, seconds in sum_per_phase(phases).items()}
        complete = {**metrics, **times, **({"time/step_s": span(phases)} if step else {})}
        self._log.write(step, complete, self.timeline.elapsed)
        for sink in self._sinks:
            sink.write(step, complete)
        self.live.step(step, complete)
        return complete

    def samples(self, step: int, trajectories: Sequence[Trajectory]) -> Path | None:
        """Write a few of the step's trajectories as text."""
        return write_samples(self._run_dir, step, trajectories, self._samples_per_step)

    def evaluation(self, result: EvaluationResult) -> Path:
        """Save an evaluation and show it."""
        path = save_result(self._run_dir, result)
        for sink in self._sinks:
            sink.write(result.step, result.metrics)
        self.live.evaluation(result)
        return path

    def note(self, text: str) -> None:
        """Record a warning and show it."""
        text = visible(text)  # an error's text may hold what neither JSON nor a terminal can
        self._notes.write({"wall_seconds": round(self.timeline.elapsed, 3), "text": text})
        self.live.note(text)

    def close(self) -> None:
        """Give the terminal back and close all files, in that order; calling it again does nothing."""
        self._close_all()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
