"""Turn SmolLM2-135M-Instruct's GGUF file into a Hugging Face checkpoint; `hub.py` runs it as a process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file of a Llama model and save it in bfloat16, with its tokenizer and chat template.

    Raises:
        ValueError: if the GGUF file has no chat template, which every episode needs.
    """
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model it loaded from GGUF; the same weights in a plain model are fine.
    model = LlamaForCausalLM(_plain_config(quantised.config))
    model.load_state_dict(quantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf.name} has no chat template")
    tokenizer.save_pretrained(folder)


def _plain_config(config: LlamaConfig) -> LlamaConfig:
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    fields["rms_norm_eps"] = float(f"{config.rms_norm_eps:.6g}")  # GGUF keeps it in float32: 9.999999747e-06
    return LlamaConfig(**fields)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
