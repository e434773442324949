"""Checkpoints: whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from k2rl.errors import ConfigError, RunError
from k2rl.training.checkpoint import (
    ABOUT_FILE,
    FORMAT,
    About,
    checkpoint_folder,
    checkpoints,
    is_sound,
    read_about,
    remove_leftovers,
    replaced_folder,
    set_aside,
    write_about,
)
from k2rl.training.group import Group
from k2rl.training.saving import METADATA_FILE, read_state, write_checkpoint

SHARD = "__0_0.distcp"


def write(folder: Path, value: torch.Tensor) -> None:
    def about(files: dict[str, Any]) -> About:
        return About(FORMAT, files, "muon", "/models/tiny", "shapes")

    write_checkpoint(folder, {"value": value}, about, Group())


def truncate(folder: Path) -> None:
    file = folder / SHARD
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "state cut off": truncate,
    "state missing": lambda folder: (folder / SHARD).unlink(),
    "table of contents missing": lambda folder: (folder / METADATA_FILE).unlink(),
    "description missing": lambda folder: (folder / ABOUT_FILE).unlink(),
    "description cut off": lambda folder: (folder / ABOUT_FILE).write_text('{"format": 3'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_none(tmp_path: Path, damage: str) -> None:
    older, newest = (checkpoint_folder(tmp_path, step) for step in (5, 10))
    for folder in (older, newest):
        write(folder, torch.arange(1000))
    assert checkpoints(tmp_path) == [(5, older), (10, newest)]
    DAMAGES[damage](newest)
    assert checkpoints(tmp_path) == [(5, older)]
    remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == [older]
    assert torch.equal(read_state(older)["value"], torch.arange(1000))


@pytest.mark.parametrize("file", [SHARD, METADATA_FILE])
def test_a_byte_that_has_changed_is_found(tmp_path: Path, file: str) -> None:
    folder = checkpoint_folder(tmp_path, 1)
    write(folder, torch.arange(1000))
    assert is_sound(folder)
    state = bytearray((folder / file).read_bytes())
    state[len(state) // 2] ^= 1
    (folder / file).write_bytes(state)
    assert checkpoints(tmp_path) == [(1, folder)]
    assert not is_sound(folder)
    for _ in range(2):
        set_aside(folder)
        assert checkpoints(tmp_path) == []
        write(folder, torch.arange(1000))
    remove_leftovers(tmp_path)
    assert {path.name for path in folder.parent.iterdir()} == {"step_000001", "step_000001.damaged"}


def test_a_full_disk_leaves_the_older_one(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as it does on a full disk."""
    older = checkpoint_folder(tmp_path, 1)
    write(older, torch.ones(1))
    code = (
        "import resource\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from functools import partial\n"
        "from k2rl.training.checkpoint import About\n"
        "from k2rl.training.group import Group\n"
        "from k2rl.training.saving import write_checkpoint\n"
        "about = partial(About, 3, optimizer='muon', model='m', shapes='s')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        f"folder = Path({str(checkpoint_folder(tmp_path, 2))!r})\n"
        "write_checkpoint(folder, {'value': torch.zeros(1 << 20)}, about, Group())\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.endswith("checkpoint step_000002 cannot be written: [Errno 27] File too large")
    assert [path.name for path in older.parent.iterdir()] == ["step_000001"]
    assert is_sound(older)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkpoint_folder(tmp_path, 1), torch.ones(1))

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RunError, match="step_000002 cannot be written: disk full"):
        write(checkpoint_folder(tmp_path, 2), torch.ones(1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_process_killed_while_it_writes_leaves_the_older_one(tmp_path: Path) -> None:
    older = checkpoint_folder(tmp_path, 1)
    write(older, torch.ones(1))
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from k2rl.training.checkpoint import replaced_folder\n"
        f"with replaced_folder(Path({str(checkpoint_folder(tmp_path, 2))!r})) as folder:\n"
        "    (folder / '__0_0.distcp').write_bytes(b'half of it')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert checkpoints(tmp_path) == [(1, older)]
    (tmp_path / "checkpoints" / "notes.txt").write_text("the user's own")
    remove_leftovers(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000001", "notes.txt"}


def test_a_failed_export_leaves_the_last_folder(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")

    def export() -> None:
        with replaced_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("second")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export()
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_states_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert read_about(tmp_path) is None
    with pytest.raises(ConfigError, match="holds no whole trainer checkpoint"):
        read_state(tmp_path)
    folder = tmp_path / "checkpoint"
    write(folder, torch.arange(1000))
    about = read_about(folder)
    assert about is not None
    assert (about.optimizer, about.model, about.shapes) == ("muon", "/models/tiny", "shapes")
    for file in (SHARD, METADATA_FILE):
        sound = (folder / file).read_bytes()
        (folder / file).write_bytes(b"?" * len(sound))
        with pytest.raises(ConfigError, match="cannot be read as a checkpoint"):
            read_state(folder)
        (folder / file).write_bytes(sound)
    assert torch.equal(read_state(folder)["value"], torch.arange(1000))
    write_about(folder, msgspec.structs.replace(about, format=99))
    with pytest.raises(ConfigError, match="format 99"):
        read_state(folder)
