"""What is loaded, what is refused, and what is written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import random_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from k2rl.config import OptimizerConfig
from k2rl.errors import ConfigError
from k2rl.training.engine import TrainEngine
from k2rl.training.loading import load_causal_lm


def edited(path: Path, target: Path, **changes: object) -> Path:
    """A copy of a model's folder with other settings in its config."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_causal_lm(tmp_path)


def test_a_sliding_window_is_refused(qwen3_path: Path, tmp_path: Path) -> None:
    """A custom mask bypasses the window: such a model would be trained on other numbers than it serves."""
    path = edited(
        qwen3_path,
        tmp_path / "sliding",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    with pytest.raises(ConfigError, match="sliding_attention"):
        load_causal_lm(path)


def test_scaled_logits_are_refused(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a model does after its head, the check at load sees the difference."""
    plain = LlamaForCausalLM.forward

    def scaled(self: object, **kwargs: object) -> object:
        output = plain(self, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ConfigError, match="differ by"):
        TrainEngine(llama_path, "float32", num_threads=1)


def test_rotary_frequencies_stay_float32(llama_path: Path) -> None:
    engine = TrainEngine(llama_path, "bfloat16", num_threads=1)
    assert all(buffer.dtype == torch.float32 for _, buffer in engine._model.named_buffers())
    assert all(parameter.dtype == torch.bfloat16 for _, parameter in engine._model.named_parameters())
    reference = AutoModelForCausalLM.from_pretrained(llama_path, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert torch.equal(engine._model(input_ids=ids).logits, reference(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_pretrained_is_a_plain_checkpoint(model_path: Path, tmp_path: Path, dtype: str) -> None:
    engine = TrainEngine(model_path, dtype, OptimizerConfig(lr=1e-2), num_threads=1)
    engine.sft_step(random_texts(1))
    for _ in range(2):  # the second replaces the first
        engine.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    loaded = dict(model.named_parameters())
    for name, tensor in engine.named_weights():
        assert torch.equal(loaded[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "w5 w6"}]
    assert tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) == [5, 6]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
