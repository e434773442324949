import subprocess
import sys

import torch

from k2rl.checkpoint_engine.arena import Arena
from k2rl.workers.memory import release

MIB = 1 << 20


def test_released_memory_goes_back_and_can_be_used_again() -> None:
    # In a process of its own: others allocate beside the measurement.
    code = """
import torch
from k2rl.workers.memory import release, resident, trim
MIB = 1 << 20
tensor = torch.ones(64 * MIB, dtype=torch.uint8)
full, address = resident(), tensor.data_ptr()
given = release([tensor, tensor[5:], torch.empty(0), torch.ones(3)])
assert 63 * MIB < given <= 64 * MIB, given
assert full - resident() > 60 * MIB
assert tensor.data_ptr() == address
assert tensor[MIB:-MIB].sum() == 0
tensor.fill_(2)
assert int(tensor.sum(dtype=torch.int64)) == 2 * 64 * MIB
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_neighbour_on_the_same_page_keeps_its_bytes() -> None:
    memory = torch.ones(MIB, dtype=torch.uint8).numpy()
    half = MIB // 2 + 100
    first, second = (
        torch.frombuffer(memory, dtype=torch.uint8, count=half, offset=offset) for offset in (0, MIB - half)
    )
    release([first[:7]])
    assert bool((second[200:] == 1).all())
    assert bool((first[MIB // 4 :: 4096][:-1] == 0).all())


def test_a_mapping_of_shared_memory_keeps_what_others_wrote() -> None:
    arena = Arena.create(8 * MIB)
    arena.memory.fill_(3)
    for writable in (True, False):
        other = Arena.open([arena.path], arena.name, writable)
        assert int(other.memory[::4096].sum()) == 3 * 2048
        release([other.memory])
        assert bool((other.memory == 3).all())
        other.close()
    assert bool((arena.memory == 3).all())
    arena.close()
