"""Whether a model's layers all have full attention, which shared-prefix packing needs. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k2rl.errors import ConfigError


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
