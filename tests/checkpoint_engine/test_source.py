"""Weights straight from a checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from k2rl.checkpoint_engine import disk
from k2rl.checkpoint_engine.pieces import pieces_of
from k2rl.checkpoint_engine.plan import plan_push
from k2rl.checkpoint_engine.source import StoredWeights


def read(folder: Path, dtype: str) -> dict[str, torch.Tensor]:
    """What a push of a checkpoint would send."""
    source = StoredWeights(folder, dtype)
    plan = plan_push(source.manifest, (0,), bucket_bytes=1 << 12)
    memory = torch.zeros(plan.arena_bytes, dtype=torch.uint8)
    pieces = [piece for bucket in plan.buckets for piece in pieces_of(bucket, memory, owner=0)]
    source.copier(plan, pieces)()
    source.close()
    specs = {piece.tensor: plan.tensors[piece.tensor] for piece in pieces}
    return {
        spec.name: piece.memory.view(getattr(torch, spec.dtype)).view(spec.shape)
        for piece in pieces
        for spec in [specs[piece.tensor]]
    }


def test_only_the_shards_of_the_index_are_read(tmp_path: Path) -> None:
    """Some repositories also hold all weights in one file, under another framework's names."""
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in shards.items():
        save_file({name: torch.ones(2)}, tmp_path / file)
    save_file({"layers.0.a": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = read(tmp_path, "bfloat16")
    assert list(found) == ["a", "b"]
    assert all(torch.equal(tensor, torch.ones(2, dtype=torch.bfloat16)) for tensor in found.values())


def test_floating_tensors_are_converted_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "CONVERTED_AT_ONCE", 7)
    random = torch.Generator().manual_seed(0)
    sent = {
        "half": torch.randn(5, 5, generator=random).bfloat16(),
        "same": torch.randn(3, generator=random),
        "scalar": torch.tensor(1.5, dtype=torch.float16),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "numbers": torch.arange(6).view(2, 3),
        "quantised": torch.ones(4).to(torch.float8_e4m3fn),
    }
    save_file(sent, tmp_path / "model.safetensors")
    found = read(tmp_path, "float32")
    del sent["empty"]  # nothing to send
    assert found.keys() == sent.keys()
    for name, tensor in sent.items():
        kept = name in ("numbers", "quantised")
        expected = tensor if kept else tensor.float()
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name].float(), expected.float())
