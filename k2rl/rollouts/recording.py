"""A step's trajectories on disk, token by token: to train on them again, and so that a crash loses none.

A run keeps them as `rollouts/step_<n>.msgpack.gz`, written before the step learns from them. Until then they
are in the store of episodes.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from k2rl.config import Config
from k2rl.errors import ConfigError
from k2rl.types import Trajectory

FOLDER = "rollouts"
FORMAT = 2
STORE = "episodes.sqlite3"
"""The store's file in that folder, unless it is elsewhere."""


class Recording(msgspec.Struct, frozen=True):
    """The trajectories of a step, and what they were sampled with."""

    format: int
    #: `k2rl.models.hub.shapes_fingerprint` of the model whose tokens they are.
    model: str
    #: `settings_of` the run.
    settings: str
    #: Digest of the weights that the step began with, and their version: tokens of others are older.
    weights: str
    version: int
    trajectories: list[Trajectory]


class Source(msgspec.Struct, frozen=True):
    """What a step's trajectories were sampled with; fields as in `Recording`."""

    model: str
    settings: str
    weights: str
    version: int


def settings_of(config: Config) -> str:
    """A digest of all that decides which tasks a step has, how they are played and how they are judged."""
    return _digest(playing_settings_of(config), config.train.steps)


def playing_settings_of(config: Config) -> str:
    """A digest of what decides how an episode is played and judged, at whatever step that is."""
    # Where episodes are kept and played decides nothing.
    rollout = {name: value for name, value in asdict(config.rollout).items() if name != "store"}
    env = {name: value for name, value in asdict(config.env).items() if name != "service"}
    return _digest(
        *(env, config.rubric, rollout, config.temperature, config.budget, config.seed),
        config.inference.max_model_len,
    )


def _digest(*deciding: Any) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(deciding))


def write_recording(run_dir: Path, step: int, source: Source, trajectories: Sequence[Trajectory]) -> Path:
    """Write a step's trajectories; the file is whole or not there."""
    path = _path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    recording = Recording(
        FORMAT, source.model, source.settings, source.weights, source.version, list(trajectories)
    )
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
