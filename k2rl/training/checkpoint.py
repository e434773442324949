"""Checkpoints that a crash cannot harm: written beside, made durable, then renamed into place."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from k2rl.errors import ConfigError

STATE_FILE = "trainer.pt"
FORMAT = 1


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `folder/trainer.pt`; an earlier one is replaced in one atomic rename."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATE_FILE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE_FILE)
    finally:
        temporary.unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Raises:
        ConfigError: if there is no checkpoint, it is damaged, or of another format.
    """
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
    """A temporary folder that takes the place of `folder` when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.new"
    outdated = folder.parent / f".{folder.name}.{os.getpid()}.old"
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rename(outdated)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)
