"""A checkpoint is read once, by all ranks together, and a damaged one is refused by name."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from k2rl.checkpoint_engine.disk import CheckpointSource, balance, checkpoint_manifest
from k2rl.errors import ConfigError
from k2rl.models.hub import resolve_model

NUMPY_DTYPES = ("float32", "float16", "int64", "uint8", "bool")


@given(
    tensors=st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0, 1, 4, 100, 5000])), max_size=20),
    ranks=st.integers(1, 9),
)
def test_ranks_share_rows_evenly_and_in_order(tensors: list[tuple[int, int]], ranks: int) -> None:
    shards = balance(tensors, ranks)
    covered = [(shard.tensor, row) for shard in shards for row in range(shard.start, shard.stop)]
    assert covered == [(index, row) for index, (rows, _) in enumerate(tensors) for row in range(rows)]
    owners = [shard.owner for shard in shards]
    assert owners == sorted(owners), "a rank's rows follow each other"
    assert set(owners) <= set(range(ranks))
    total = sum(rows * row_bytes for rows, row_bytes in tensors)
    largest = max((row_bytes for _, row_bytes in tensors), default=0)
    for _, mine in groupby(shards, key=lambda shard: shard.owner):
        nbytes = sum((shard.stop - shard.start) * tensors[shard.tensor][1] for shard in mine)
        assert nbytes <= total / ranks + largest


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from(NUMPY_DTYPES),
    ranks=st.integers(1, 4),
    files=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_what_was_saved_is_read(
    shapes: list[list[int]], dtype: str, ranks: int, files: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    saved = {
        f"t{index}": np.asarray(random.integers(0, 2, s)).astype(dtype) for index, s in enumerate(shapes)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, saved, files)
        manifest = checkpoint_manifest(folder, ranks)
        manifest.check()
        found = {spec.name: bytearray(spec.nbytes) for spec in manifest.tensors}
        with CheckpointSource(folder) as source:
            assert source.tensors == manifest.tensors
            for shard in manifest.shards:
                spec = manifest.tensors[shard.tensor]
                row = spec.nbytes // max(spec.rows, 1)
                place = memoryview(found[spec.name])[shard.start * row : shard.stop * row]
                source.write(shard.tensor, shard.start, shard.stop, place)
    assert {spec.name: (spec.dtype, spec.shape) for spec in manifest.tensors} == {
        name: (dtype, tensor.shape) for name, tensor in saved.items()
    }
    assert found == {name: tensor.tobytes() for name, tensor in saved.items()}


def save(folder: Path, tensors: dict[str, np.ndarray], files: int) -> None:
    """A checkpoint of so many files, with an index if there is more than one."""
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    index = {name: f"model-{number % files + 1:05d}.safetensors" for number, name in enumerate(tensors)}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_ranks_read_a_checkpoint_once(tmp_path: Path) -> None:
    """Three processes, one shared memory; what they have read is the kernel's count."""
    folder = resolve_model("tiny-qwen3")
    ranks = 3
    manifest = checkpoint_manifest(folder, ranks)
    shared = tmp_path / "shared"
    shared.write_bytes(bytes(manifest.nbytes))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(ranks) as pool:
        work = [(folder, ranks, rank, shared) for rank in range(ranks)]
        counts = pool.starmap_async(read_my_part, work, chunksize=1).get(timeout=60)
    assert sum(counts) == manifest.nbytes
    assert max(counts) < manifest.nbytes / ranks * 1.01
    file = (folder / "model.safetensors").read_bytes()
    assert shared.read_bytes() == file[8 + int.from_bytes(file[:8], "little") :]


def read_my_part(folder: Path, ranks: int, rank: int, shared: Path) -> int:
    """Read one rank's rows into a memory in which the tensors follow each other; how many bytes that took."""
    manifest = checkpoint_manifest(folder, ranks)
    starts = np.cumsum([0, *(spec.nbytes for spec in manifest.tensors)])
    with CheckpointSource(folder) as source, shared.open("r+b") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0))
        before = Path("/proc/self/io").read_text()
        for shard in manifest.shards:
            if shard.owner == rank:
                spec = manifest.tensors[shard.tensor]
                first, row = int(starts[shard.tensor]), spec.nbytes // spec.rows
                place = memory[first + shard.start * row : first + shard.stop * row]
                source.write(shard.tensor, shard.start, shard.stop, place)
        after = Path("/proc/self/io").read_text()
    return read_bytes(after) - read_bytes(before) - len(before)


def read_bytes(io: str) -> int:
    return int(io.split("rchar:")[1].split()[0])


def entry(offsets: list[int], shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: object, nbytes: int, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(nbytes)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "0 bytes cannot hold a header of 0"),
        (raw({}, 0, length=1 << 40), "cannot hold a header of"),
        (raw({}, 4)[:8] + b"\xff\xff", "not JSON"),
        (raw([], 0), "not a table"),
        (raw({"a": entry([0, 8], [2])}, 7), "its tensors end at byte"),
        (raw({"a": entry([0, 8], [2])}, 9), "its tensors end at byte"),
        (raw({"a": entry([0, 8], [3])}, 8), "a has 8 bytes"),
        (raw({"a": entry([-8, 0], [2])}, 8), "a has 8 bytes"),
        (raw({"a": entry([0, 8], [-1, -2])}, 8), "a has 8 bytes"),
        (raw({"a": entry([0, 8], [2]), "b": entry([4, 12], [2])}, 12), "b is at byte"),
        (raw({"a": entry([0, 8], [2]), "b": entry([12, 16], [1])}, 16), "b is at byte"),
        (raw({"a": entry([0, 8], [2], "F6_E2M3")}, 8), "entry of a is not understood: 'F6_E2M3'"),
        (raw({"a": {"dtype": "F32"}}, 8), "entry of a is not understood: 'shape'"),
        (raw({"a": 3}, 8), "entry of a is not understood"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(lambda: checkpoint_manifest(tmp_path, 2), tmp_path, "model.safetensors is damaged", why)


def test_a_missing_file_and_a_false_index_are_named(tmp_path: Path) -> None:
    save(tmp_path, {"a": np.zeros(2), "b": np.zeros(2)}, 2)
    second = tmp_path / "model-00002.safetensors"
    save_file({"a": np.zeros(2)}, second)
    refused(
        lambda: checkpoint_manifest(tmp_path, 2), tmp_path, second.name, "a is in model-00001.safetensors"
    )
    save_file({"c": np.zeros(2)}, second)
    refused(lambda: checkpoint_manifest(tmp_path, 2), tmp_path, second.name, "b should be in it")
    second.unlink()
    refused(lambda: checkpoint_manifest(tmp_path, 2), tmp_path, second.name, "missing")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    save(tmp_path, {"a": np.zeros(1000)}, 1)
    with CheckpointSource(tmp_path) as source:
        os.truncate(tmp_path / "model.safetensors", 500)
        refused(
            lambda: source.write(0, 0, 1000, memoryview(bytearray(8000))),
            tmp_path,
            "model.safetensors is damaged",
            "ends at byte 500",
        )
        with pytest.raises(ValueError, match="7999 bytes for 1000 float64"):
            source.write(0, 0, 1000, memoryview(bytearray(7999)))


def refused(action: Callable[[], object], folder: Path, *words: str) -> None:
    """It ends with one line that says all this."""
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (str(folder), *words)), message
