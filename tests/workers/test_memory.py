import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2rl.checkpoint_engine.arena import Arena
from k2rl.errors import RunError
from k2rl.workers.memory import Engine, MemoryLedger, release

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


@given(
    st.lists(st.tuples(st.sampled_from(["trainer", "vllm"]), st.integers(0, 3), st.booleans()), max_size=20)
)
def test_only_one_engine_holds_what_takes_turns(moves: list[tuple[Engine, int, bool]]) -> None:
    """Against a plain account: whatever the engines try, it refuses exactly what would be both at once."""
    ledger, held = MemoryLedger(), {"trainer": 0, "vllm": 0}
    for engine, nbytes, begins in moves:
        other: Engine = "vllm" if engine == "trainer" else "trainer"
        if begins and held[other]:
            with pytest.raises(RunError, match=f"turn of {engine}, but {other} still holds"):
                ledger.begin(engine)
            ledger.give_up(other)
            held[other] = 0
        if begins:
            ledger.begin(engine)
        elif nbytes and ledger.turn == other:
            with pytest.raises(RunError, match=f"{engine} takes .* turn of {other}"):
                ledger.hold(engine, "weights", nbytes)
        else:
            ledger.hold(engine, "weights", nbytes)
            held[engine] = nbytes
        assert {name: ledger.held(name) for name in ("trainer", "vllm")} == held
        assert ledger.turn is None or not held["vllm" if ledger.turn == "trainer" else "trainer"]


def test_what_takes_no_turns_stays_in_the_ledger() -> None:
    ledger = MemoryLedger()
    ledger.hold("trainer", "parameters", 1 << 30, takes_turns=False)
    ledger.hold("trainer", "gradients", 1 << 29)
    ledger.give_up("trainer")
    ledger.begin("vllm")
    assert ledger.gib() == {"trainer_parameters_gib": 1.0}
