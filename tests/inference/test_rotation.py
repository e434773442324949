"""Which models of vLLM's on a CPU have their queries rotated by PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from k2rl.inference.rotation import rotate_natively

LATENT = SimpleNamespace(qk_rope_head_dim=64)


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        (LATENT, ["all"], ["all", "-rotary_embedding"]),
        (LATENT, ["none", "+rms_norm"], ["none", "+rms_norm", "-rotary_embedding"]),
        (LATENT, ["all", "+rotary_embedding"], ["all", "+rotary_embedding"]),
        (LATENT, ["all", "-rotary_embedding"], ["all", "-rotary_embedding"]),
        (SimpleNamespace(head_dim=64), ["all"], ["all"]),
        (SimpleNamespace(qk_rope_head_dim=None), ["all"], ["all"]),
    ],
)
def test_latent_attention_is_rotated_natively_unless_the_user_says_otherwise(
    model: Any, before: list[str], after: list[str]
) -> None:
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=model),
        compilation_config=SimpleNamespace(custom_ops=before),
    )
    rotate_natively(config)
    assert config.compilation_config.custom_ops == after
