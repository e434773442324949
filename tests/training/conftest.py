"""Tiny models on disk, built once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_model


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def qwen3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(params=["llama", "qwen3"])
def model_path(request: pytest.FixtureRequest, llama_path: Path, qwen3_path: Path) -> Path:
    return {"llama": llama_path, "qwen3": qwen3_path}[request.param]


@pytest.fixture(autouse=True)
def restore_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
