"""Checkpoints are written while a run goes on: the disk fills up, or the writer is killed half-way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from k2rl.training.checkpoint import checkpoint_folder, checkpoints, is_sound
from tests import netns
from tests.integration.conftest import DEADLINE_S, Command
from tests.integration.test_recovery import WORKER, Victim

pytestmark = [pytest.mark.integration, pytest.mark.slow]

Start = Callable[..., Command]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 32 MiB of its own, mounted there."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all that is free."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free)
    return ballast


def newest(run: Victim) -> int:
    return max((step for step, _ in checkpoints(run.run_dir)), default=-1)


@pytest.mark.skipif(not netns.available(), reason="needs root to mount a file system")
def test_a_disk_that_is_full_for_a_while(start: Start, tmp_path: Path) -> None:
    run = Victim(start, tmp_path, 8, "train.checkpoint_every=1", "train.keep_checkpoints=1")
    run.until((run.run_dir / "logs").exists, "the run owns its folder")
    with small_disk(run.run_dir / "checkpoints"):
        _fill_it_twice(run, start, tmp_path)


def _fill_it_twice(run: Victim, start: Start, tmp_path: Path) -> None:
    notes, disk = run.run_dir / "notes.jsonl", run.run_dir / "checkpoints"
    run.until(lambda: newest(run) >= 1, "a checkpoint of a step")
    ballast = fill(disk)
    run.until(lambda: "No space left on device" in notes.read_text(), "the full disk is found")
    kept = newest(run)
    assert is_sound(checkpoint_folder(run.run_dir, kept))
    ballast.unlink()
    run.until(lambda: newest(run) > kept, "a checkpoint is written again")
    ballast = fill(disk)
    code, _, err = run.command.finish()
    assert code == 1, err
    assert err.startswith(
        f"k2rl: checkpoint step_{run.steps:06d} cannot be written: [Errno 28] No space left"
    )
    noted = [json.loads(line)["text"] for line in notes.read_text().splitlines()]
    assert any("was written, the last one is of step" in note for note in noted)
    assert f"the run stopped after step {newest(run)}; go on with: k2rl train resume=" in noted[-1]
    assert run.last_step == run.steps
    assert is_sound(checkpoint_folder(run.run_dir, newest(run)))

    ballast.unlink()
    resumed = start("train", f"resume={run.run_dir}", cwd=tmp_path)
    code, _, err = resumed.finish()
    assert code == 0, err
    assert newest(run) == run.steps


def test_a_worker_that_is_killed_while_it_writes(start: Start, tmp_path: Path) -> None:
    run = Victim(start, tmp_path, 12, "train.checkpoint_every=1", "train.keep_checkpoints=1")
    run.after("publish", 1)
    kept, torn = killed_while_writing(run)
    assert is_sound(kept), "what was written before is as it was"
    run.until(lambda: len(run.restarts) == 1, "the death is found")
    run.ends_well()
    assert (
        f"going on from step {int(kept.name.removeprefix('step_'))}"
        in (run.run_dir / "notes.jsonl").read_text()
    )
    assert not torn.exists()
    assert [path.name for path in kept.parent.iterdir()] == [f"step_{run.steps:06d}"]


def killed_while_writing(run: Victim) -> tuple[Path, Path]:
    """Kill the worker when a checkpoint is half there; returns the one before it, and that one."""
    worker, folder = run.command.named(WORKER), run.run_dir / "checkpoints"
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if not any(folder.glob(".step_*.new")):
            time.sleep(0.0005)
            continue
        worker.send_signal(signal.SIGSTOP)
        torn, kept = list(folder.glob(".step_*.new")), checkpoints(run.run_dir)
        if torn and kept:
            worker.kill()
            psutil.wait_procs([worker])
            return kept[-1][1], torn[0]
        worker.send_signal(signal.SIGCONT)
    raise AssertionError("no checkpoint was seen being written")
