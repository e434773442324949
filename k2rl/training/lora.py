"""Low-rank adapters (LoRA, arXiv 2106.09685) in the trainer's model, by peft.

A layer computes W x + alpha / rank B A x. W stays as it is; A begins random and B zero, so that the model
begins as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import save_file
from torch import Tensor, nn

from k2rl.config import LoraConfig
from k2rl.models.adapters import adapted_layers, kinds

ADAPTER_FOLDER = "adapter"
"""Of a saved model: the adapters as peft saves them."""

_MODULE_PREFIX = "base_model.model."
"""Of names in files of peft's."""


def add_adapters(model: nn.Module, path: Path, lora: LoraConfig) -> None:
    """Put adapters into a model, and freeze all else; from torch's generator.

    Raises:
        ConfigError: as `adapted_layers`.
    """
    peft.inject_adapter_in_model(_peft_config(path, lora), model)
    model.eval()


def save_adapter(folder: Path, path: Path, lora: LoraConfig, factors: Mapping[str, Tensor]) -> None:
    """Write the adapters as peft does: `PeftModel.from_pretrained` takes them, and so does vLLM.

    Args:
        folder: to be written.
        path: the model that they belong to.
        lora: what they are.
        factors: all of them, whole.
    """
    folder.mkdir()
    _peft_config(path, lora).save_pretrained(str(folder))
    tensors = {_MODULE_PREFIX + name: factor.cpu().contiguous() for name, factor in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(path: Path, lora: LoraConfig) -> Any:
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=kinds(adapted_layers(path, lora)),
        lora_dropout=0.0,
        base_model_name_or_path=str(path),
        task_type="CAUSAL_LM",
    )
