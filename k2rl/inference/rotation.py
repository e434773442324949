"""A kernel of vLLM's for the CPU that is wrong, and is not used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def rotate_natively(config: VllmConfig) -> None:
    """Before a model with latent attention is built on a CPU: let PyTorch rotate its queries and keys.

    Of a query [tokens, heads, size] whose pairs to be rotated are neighbours, vLLM 0.32's kernel for the CPU
    rotates the first head alone rightly: log-probs of DeepSeek's and Kimi's models were tenths of a nat off.
    A `rotary_embedding` that the user has in `compilation_config.custom_ops` stays as it is.

    Args:
        config: of the engine; `compilation_config` is changed.
    """
    operations = config.compilation_config.custom_ops
    latent = getattr(config.model_config.hf_text_config, "qk_rope_head_dim", None) is not None
    if latent and not {"+rotary_embedding", "-rotary_embedding"} & set(operations):
        operations.append("-rotary_embedding")
