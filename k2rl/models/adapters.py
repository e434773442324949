"""Which linear layers of a model get low-rank adapters. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from k2rl.checkpoint_engine.disk import checkpoint_manifest
from k2rl.config import LoraConfig
from k2rl.errors import ConfigError
from k2rl.models.factors import FACTORS

NO_ADAPTERS = "lora.rank=0"

#: Matrices of decoder layers. Not of routed experts and their routers, which transformers' models do not have
#: as linear layers.
_LINEAR = re.compile(r"(?!.*\.experts\.)(.*\.layers\.\d+\..*\.(?!gate\.)\w+)\.weight")


def linear_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of a checkpoint's decoder layers: [out, in] of each, by the name of its module.

    Without those that are named as parts of routed experts (of shared experts, of layers without experts):
    asked to adapt them, peft adapts the experts.

    Raises:
        ConfigError: as `checkpoint_manifest`.
    """
    tensors = checkpoint_manifest(folder, 1).tensors
    of_experts = {kind(spec.name.removesuffix(".weight")) for spec in tensors if ".experts." in spec.name}
    return {
        match[1]: (spec.shape[0], spec.shape[1])
        for spec in tensors
        if len(spec.shape) == 2
        and (match := _LINEAR.fullmatch(spec.name))
        and kind(match[1]) not in of_experts
    }


def adapted_layers(folder: Path, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """Those of `linear_layers` that get an adapter.

    Raises:
        ConfigError: a target is not there, or an adapter would be no smaller than what it adapts.
    """
    layers = linear_layers(folder)
    known = kinds(layers)
    for target in lora.target_modules:
        if target not in known:
            raise ConfigError(
                f"lora.target_modules names {target!r}, but the linear layers of model {folder.name} are: "
                f"{', '.join(known) or 'none'}"
            )
    wanted = set(lora.target_modules or known)
    found = {name: shape for name, shape in layers.items() if kind(name) in wanted}
    for name, (outputs, inputs) in found.items():
        if lora.rank * (outputs + inputs) >= outputs * inputs:
            raise ConfigError(
                f"lora.rank={lora.rank} makes the adapter of {name} no smaller than its {outputs} x {inputs} "
                "weight: lower it, or train all weights with lora.rank=0"
            )
    return found


def kinds(names: Iterable[str]) -> list[str]:
    """The last parts of modules' names, each once, in their order."""
    return list(dict.fromkeys(kind(name) for name in names))


def kind(name: str) -> str:
    """The last part of a module's name, which `lora.target_modules` has."""
    return name.rpartition(".")[2]


def adapter_tensors(folder: Path, lora: LoraConfig, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of all factors, by name.

    Raises:
        ConfigError: as `adapted_layers`.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (outputs, inputs) in adapted_layers(folder, lora).items():
        for factor, shape in zip(FACTORS, ((lora.rank, inputs), (outputs, lora.rank)), strict=True):
            tensors[name + factor] = (dtype, shape)
    return tensors


def settings(lora: LoraConfig | None) -> str:
    """What must stay as it is for a run to go on with its adapters, as overrides of its configuration."""
    if lora is None or not lora.rank:
        return NO_ADAPTERS
    targets = ",".join(sorted(lora.target_modules))
    return f"lora.rank={lora.rank} lora.alpha={lora.alpha:g} lora.target_modules=[{targets}]"
