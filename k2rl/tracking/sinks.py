"""Where metrics go besides `metrics.jsonl`: TensorBoard and Weights & Biases.

Both are imported only when a run asks for them, and neither imports torch.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2rl.errors import ConfigError
from k2rl.tracking.metrics import Metrics


class TensorBoardSink:
    """Writes event files to `directory`.

    With `resume_step` TensorBoard forgets what earlier files hold of later steps.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event_type: Any = event_pb2.Event
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of the time in their names; nanoseconds and the
        # process id keep those of two quick starts apart.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:020.9f}.{os.getpid()}"
        # tensorboard's own EventFileWriter does the same from a background thread; one write a step
        # needs none.
        self._writer: Any = RecordWriter((directory / name).open("wb"))
        self._append(self._event(file_version="brain.Event:2"))
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._append(self._event(step=resume_step + 1, session_log=start))

    def write(self, step: int, metrics: Metrics) -> None:
        event = self._event(step=step)
        for name, value in metrics.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._append(event)

    def close(self) -> None:
        self._writer.close()

    def _event(self, **fields: Any) -> Any:
        return self._event_type(wall_time=time.time(), **fields)

    def _append(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()


class WandbSink:
    """Sends metrics to Weights & Biases; a resumed run goes on with the same W&B run.

    Raises:
        ConfigError: if the package is not installed.
    """

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "tracking.wandb=true needs the wandb package: pip install wandb, or set tracking.wandb=false"
            ) from error
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._run: Any = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text().strip(),
            dir=str(run_dir),
            resume="allow",
            config=dict(config),
        )
        # W&B's own step may only grow, and a resumed run repeats steps; ours is a metric like others.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Metrics) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._run.log({"step": step, **finite})

    def close(self) -> None:
        self._run.finish()
