"""A step's trajectories on disk, token by token: to train on them again, and so that a crash loses none.

A run keeps them as `rollouts/step_<n>.msgpack.gz`, written before the step learns from them. Until all of
them are there, those that are finished are in a journal, `rollouts/step_<n>.jsonl`.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import xxhash

from k2rl.config import Config
from k2rl.errors import ConfigError, RunError
from k2rl.tracking.jsonl import rewind_jsonl
from k2rl.types import Trajectory

logger = logging.getLogger(__name__)

FOLDER = "rollouts"
FORMAT = 1


class Recording(msgspec.Struct, frozen=True):
    """The trajectories of a step, and what they were sampled with."""

    format: int
    #: `k2rl.models.hub.shapes_fingerprint` of the model whose tokens they are.
    model: str
    #: `settings_of` the run.
    settings: str
    #: Digest of the weights that all of it was sampled from.
    weights: str
    trajectories: list[Trajectory]


class Source(msgspec.Struct, frozen=True):
    """What trajectories were sampled with: those of another source are none of a step's."""

    #: As in `Recording`.
    model: str
    settings: str
    weights: str


class _Entry(msgspec.Struct, frozen=True):
    source: Source
    trajectory: Trajectory


class Journal:
    """The finished trajectories of a step that is not over; a context manager.

    A process that dies leaves what it has written, if not always a machine that does.
    """

    def __init__(self, run_dir: Path, step: int, source: Source) -> None:
        """Open it, with what an earlier process has finished of the same step and source."""
        self._path = run_dir / FOLDER / f"step_{step:06d}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._source = source
        try:
            entries = rewind_jsonl(self._path, _Entry, lambda entry: entry.source == source)
        except RunError as error:
            logger.warning("the finished rollouts of step %d are sampled again", step, exc_info=error)
            self._path.unlink()
            entries = []
        #: By id.
        self.finished = {entry.trajectory.id: entry.trajectory for entry in entries}
        self._file = self._path.open("ab")

    def add(self, trajectory: Trajectory) -> None:
        """Keep it, unless it failed: then it may be tried again."""
        if not trajectory.failed:
            self._file.write(msgspec.json.encode(_Entry(self._source, trajectory)) + b"\n")
            self._file.flush()

    def remove(self) -> None:
        """The step's recording has taken its place."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def settings_of(config: Config) -> str:
    """A digest of all that decides which tasks a step has, how they are played and how they are judged."""
    deciding = (
        *(config.env, config.rubric, config.rollout, config.temperature, config.budget, config.seed),
        *(config.train.steps, config.inference.max_model_len),
    )
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(deciding))


def write_recording(run_dir: Path, step: int, source: Source, trajectories: Sequence[Trajectory]) -> Path:
    """Write a step's trajectories; the file is whole or not there."""
    path = _path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    recording = Recording(FORMAT, source.model, source.settings, source.weights, list(trajectories))
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(gzip.compress(msgspec.msgpack.encode(recording), compresslevel=3, mtime=0))
    return unfinished.replace(path)


def read_recording(run_dir: Path, step: int) -> Recording:
    """What `write_recording` wrote.

    Raises:
        ConfigError: there is none, it is damaged, or of another format.
    """
    path = _path(run_dir, step)
    try:
        recording = msgspec.msgpack.decode(gzip.decompress(path.read_bytes()), type=Recording)
    except FileNotFoundError:
        raise ConfigError(
            f"{run_dir} has no recorded rollouts of step {step} ({path.name} is missing)"
        ) from None
    except (OSError, EOFError, zlib.error, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} cannot be read as recorded rollouts: {error}") from error
    if recording.format != FORMAT:
        raise ConfigError(f"{path} has format {recording.format}, this version reads {FORMAT}")
    return recording


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps of a run of which there are recordings, ascending."""
    names = (path.name.removesuffix(".msgpack.gz") for path in (run_dir / FOLDER).glob("step_*.msgpack.gz"))
    return sorted(int(name.removeprefix("step_")) for name in names)


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}.msgpack.gz"
