"""Checkpoints of a run as folders: whole or not there, and known without torch for what they are.

A run keeps them as `checkpoints/step_<n>`: the trainer's state in torch's distributed format (`saving.py`),
and `checkpoint.json`, which says what it is and what bytes its files must have.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import xxhash

from k2rl.models.adapters import NO_ADAPTERS

ABOUT_FILE = "checkpoint.json"
FORMAT = 3

_OURS = re.compile(r"step_\d+|\.(model|step_\d+)\.\d+\.(new|old)")


class FileRecord(msgspec.Struct, frozen=True):
    """What a file must be."""

    nbytes: int
    #: xxh3-128 of its bytes.
    digest: str


class About(msgspec.Struct, frozen=True):
    """What a checkpoint is; a run that goes on with it must agree in all but its files."""

    format: int
    #: All that the state is in, by name.
    files: dict[str, FileRecord]
    optimizer: str
    #: Folder of the model that was trained.
    model: str
    #: `k2rl.models.hub.shapes_fingerprint` of that model.
    shapes: str
    #: `k2rl.models.adapters.settings` of the adapters whose state this is, if it is not all of the model.
    adapters: str = NO_ADAPTERS


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
        sizes = {name: (folder / name).stat().st_size for name in about.files}
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None
    return about if all(sizes[name] == record.nbytes for name, record in about.files.items()) else None


def write_about(folder: Path, about: About) -> None:
    """Say what the checkpoint in `folder` is."""
    (folder / ABOUT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(about)) + b"\n")


def file_records(files: Iterable[Path]) -> dict[str, FileRecord]:
    """What these files are now, by name."""
    return {file.name: FileRecord(file.stat().st_size, file_digest(file)) for file in files}


def is_sound(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is whole and its bytes are those that were written."""
    about = read_about(folder)
    return about is not None and about.files == file_records(folder / name for name in about.files)


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
