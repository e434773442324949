"""State in files: what of it is in memory, and what remains of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from k2rl.errors import RunError
from k2rl.training.offload import StateFiles

MIB = 1 << 20


def test_memory_goes_and_comes_back_and_nothing_remains_of_a_killed_process(tmp_path: Path) -> None:
    # In a process of its own: others allocate beside the measurement.
    code = f"""
import os, signal, sys
from pathlib import Path
import torch
from k2rl.training.offload import StateFiles
from k2rl.workers.memory import resident, trim

MIB = 1 << 20
tensors = [torch.arange(8 * MIB, dtype=torch.float32) + index for index in range(2)]
files = StateFiles(Path({str(tmp_path)!r}))
files.adopt(tensors)
assert files.nbytes == 64 * MIB
addresses = [tensor.data_ptr() for tensor in tensors]
trim()
full = resident()
files.offload()
assert full - resident() > 60 * MIB, full - resident()
files.reload()
assert abs(full - resident()) < 4 * MIB, full - resident()
tensors[0].add_(1)
files.offload()
assert torch.equal(tensors[0], tensors[1])
assert addresses == [tensor.data_ptr() for tensor in tensors]
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_whole_pages_move_and_only_once(tmp_path: Path) -> None:
    large, small = torch.arange(5000.0), torch.arange(7.0)
    turned = torch.arange(6000.0).view(60, 100).t()
    unmoved = [small.data_ptr(), turned.data_ptr()]
    files = StateFiles(tmp_path)
    files.adopt([large, small, turned])
    address = large.data_ptr()
    files.adopt([large, small, turned])
    assert address == large.data_ptr()
    assert unmoved == [small.data_ptr(), turned.data_ptr()]
    assert torch.equal(large, torch.arange(5000.0))
    del large
    assert files.nbytes == 0


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    tensor = torch.ones(MIB)
    with pytest.raises(RunError, match=r"no room for 0\.00 GiB in .*No space left.*train\.offload=none"):
        StateFiles(tmp_path).adopt([tensor])
    assert bool((tensor == 1).all())
