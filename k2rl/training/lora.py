"""Low-rank adapters (LoRA, arXiv 2106.09685) in the trainer's model, by peft.

A layer computes W x + alpha / rank B A x. W stays as it is; A begins random and B zero, so that the model
begins as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from k2rl.config import LoraConfig
from k2rl.models.adapters import adapted_layers, kinds
from k2rl.models.factors import FACTORS, checkpoint_name, factors_of, is_factor
from k2rl.models.merging import merged
from k2rl.seeds import derive_seed

ADAPTER_FOLDER = "adapter"
"""Of a saved model: the adapters as peft saves them."""

_MODULE_PREFIX = "base_model.model."
"""Of names in files of peft's."""


@dataclass(frozen=True)
class Adapters:
    """Those of a run."""

    #: Folder of the model that they are for.
    path: Path
    lora: LoraConfig
    #: Of the run.
    seed: int

    def add_to(self, model: nn.Module) -> None:
        """Put them into a model, and freeze all else; they are yet to be filled.

        Raises:
            ConfigError: as `adapted_layers`.
        """
        from peft import inject_adapter_in_model  # takes a second

        inject_adapter_in_model(self._peft_config(), model)
        model.eval()

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Fill the factors of a model that is held whole."""
        for name, parameter in model.named_parameters():
            if is_factor(checkpoint_name(name)):
                parameter.copy_(self.first(checkpoint_name(name), parameter.shape))

    def first(self, name: str, shape: torch.Size) -> Tensor:
        """What a factor begins as: A uniform as peft has it, B zero. The same for any number of ranks.

        Args:
            name: in a checkpoint.
            shape: of all of it.
        """
        factor = torch.zeros(shape)
        if name.endswith(FACTORS[0]):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, name))
            factor.uniform_(-1, 1, generator=generator).div_(math.sqrt(shape[1]))
        return factor

    def merged(self, name: str, weight: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """A weight with its adapter, if it has one among these factors."""
        a, b = map(factors.get, factors_of(name))
        return weight if a is None or b is None else merged(weight, a, b, self.lora.scale)

    def save(self, folder: Path, factors: Mapping[str, Tensor]) -> None:
        """Write all factors as peft does: `PeftModel.from_pretrained` takes them, and so does vLLM."""
        folder.mkdir()
        self._peft_config().save_pretrained(str(folder))
        tensors = {_MODULE_PREFIX + name: factor.cpu().contiguous() for name, factor in factors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _peft_config(self) -> Any:
        from peft import LoraConfig as PeftConfig

        return PeftConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            target_modules=kinds(adapted_layers(self.path, self.lora)),
            lora_dropout=0.0,
            base_model_name_or_path=str(self.path),
            task_type="CAUSAL_LM",
        )
