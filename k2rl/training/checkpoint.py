"""Checkpoints of a run: written beside, made durable, then renamed, so that a crash cannot harm them.

A run keeps them as `checkpoints/step_<n>`: `trainer.pt` with the trainer's state, and `checkpoint.json`,
which says without torch what it is. torch is imported only where the state itself is written or read.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from k2rl.errors import ConfigError

STATE_FILE = "trainer.pt"
ABOUT_FILE = "checkpoint.json"
FORMAT = 2

_OURS = re.compile(r"step_\d+|\.(model|step_\d+)\.\d+\.(new|old)")


class About(msgspec.Struct, frozen=True):
    """What a checkpoint is; a run that goes on with it must agree in all but the size."""

    format: int
    state_bytes: int
    #: xxh3-128 of the state's file.
    state_digest: str
    optimizer: str
    #: Folder of the model that was trained.
    model: str
    #: `k2rl.models.hub.shapes_fingerprint` of that model.
    shapes: str


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run with their steps, oldest first; torn ones do not count."""
    found = (
        (re.fullmatch(r"step_(\d+)", path.name), path) for path in (run_dir / "checkpoints").glob("step_*")
    )
    return sorted((int(match[1]), path) for match, path in found if match and read_about(path) is not None)


def read_about(folder: Path) -> About | None:
    """What the checkpoint in `folder` is; None if there is none, or it is not whole."""
    try:
        about = msgspec.json.decode((folder / ABOUT_FILE).read_bytes(), type=About)
        size = (folder / STATE_FILE).stat().st_size
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    return about if size == about.state_bytes else None


def is_sound(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is whole and its bytes are those that were written."""
    about = read_about(folder)
    return about is not None and file_digest(folder / STATE_FILE) == about.state_digest


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it counts no more and is not lost either."""
    target = folder.with_name(f"{folder.name}.damaged")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left half-written; the caller must own the run's folder."""
    whole = {path for _, path in checkpoints(run_dir)}
    for path in (*run_dir.glob(".model.*"), *(run_dir / "checkpoints").glob("*")):
        if path.is_dir() and path not in whole and _OURS.fullmatch(path.name):
            shutil.rmtree(path)


def write_checkpoint(folder: Path, state: dict[str, Any], optimizer: str, model: Path, shapes: str) -> None:
    """Write a whole checkpoint; `folder` is there afterwards or not at all, whatever happens meanwhile."""
    import torch

    with replaced_folder(folder) as target:
        torch.save({"format": FORMAT, **state}, target / STATE_FILE)
        file = target / STATE_FILE
        about = About(FORMAT, file.stat().st_size, file_digest(file), optimizer, str(model), shapes)
        (target / ABOUT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(about)) + b"\n")


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote.

    Raises:
        ConfigError: if there is no checkpoint, it is damaged, or of another format.
    """
    import torch

    file = folder / STATE_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} holds no trainer checkpoint ({STATE_FILE} is missing)")
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{file} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if state.get("format") != FORMAT:
        raise ConfigError(f"{file} has checkpoint format {state.get('format')}, this version reads {FORMAT}")
    return state


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder`, on disk with all its files, when the block ends well.

    An earlier `folder` stays until then. A process killed between the two renames leaves it under its
    temporary name and nothing in its place; `remove_leftovers` then takes it away.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.new"
    outdated = folder.parent / f".{folder.name}.{os.getpid()}.old"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        if folder.exists():
            folder.rename(outdated)
        temporary.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes."""
    with path.open("rb") as file:
        digest: str = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return digest


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
