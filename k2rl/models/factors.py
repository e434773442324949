"""What the low-rank factors of adapters are called. Imports nothing."""

from __future__ import annotations

FACTORS = (".lora_A.weight", ".lora_B.weight")
"""Of the layer's module in a push, a checkpoint and a saved adapter: [rank, in], and [out, rank]."""


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return name.endswith(FACTORS)


def adapted_weight(factor: str) -> str:
    """The weight that an adapter's factor belongs to."""
    return f"{factor.removesuffix(FACTORS[0]).removesuffix(FACTORS[1])}.weight"


def factors_of(weight: str) -> tuple[str, str]:
    """Names of the factors that a weight would have."""
    module = weight.removesuffix(".weight")
    return module + FACTORS[0], module + FACTORS[1]


def checkpoint_name(parameter: str) -> str:
    """What a parameter of a model with adapters is called in a checkpoint; peft puts names of its own in."""
    return parameter.replace(".base_layer.", ".").replace("_A.default.", "_A.").replace("_B.default.", "_B.")
