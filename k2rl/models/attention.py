"""Whether a model's layers all have full attention, which shared-prefix packing needs. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from k2rl.errors import ConfigError

#: Families whose layers all have full attention unless their config.json names another.
_FULL_UNLESS_SAID = frozenset({"deepseek_v3", "llama", "qwen2", "qwen3", "qwen3_moe"})


def says_full_attention(path: Path) -> bool:
    """Whether the config.json in `path` is enough to know; False: ask `check_attention_config`.

    That one imports torch and transformers' models, which takes seconds; this one takes none."""
    try:
        said = json.loads((path / "config.json").read_text())
        if said["model_type"] not in _FULL_UNLESS_SAID:
            return False
        if said.get("layer_types") is not None:
            return set(said["layer_types"]) == {"full_attention"}
        switched_off = said["model_type"].startswith("qwen") and said.get("use_sliding_window") is False
        return said.get("sliding_window") is None or switched_off
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_attention_config(path: Path) -> Any:
    """The configuration of the checkpoint in `path`, once it is known that it can be packed.

    A packed row brings its own attention, which replaces whatever else a layer would have masked.

    Raises:
        ConfigError: one line, if it cannot be read or names layers with another attention.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.path={path}: config.json cannot be used: {reason}") from error
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if kinds is None else None
    other = sorted(set(kinds or ()) - {"full_attention"})
    if window is not None and window < config.max_position_embeddings:
        other = [f"sliding_attention (window {window})"]
    if other:
        raise ConfigError(
            f"model.path={path} ({config.model_type}) has layers with {', '.join(other)}; shared-prefix "
            "packing needs full attention in all of them: choose another model"
        )
    return config
