"""Weights straight from a checkpoint's files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from k2rl.checkpoint_engine.source import checkpoint_weights


def test_only_the_shards_of_the_index_are_read(tmp_path: Path) -> None:
    """Some repositories also hold all weights in one file, under another framework's names."""
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in shards.items():
        save_file({name: torch.ones(2)}, tmp_path / file)
    save_file({"layers.0.a": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = list(checkpoint_weights(tmp_path, "bfloat16"))
    assert [name for name, _ in found] == ["a", "b"]
    assert all(torch.equal(tensor, torch.ones(2, dtype=torch.bfloat16)) for _, tensor in found)
