"""Which rows of which parameters a head's attention logits grow with. No torch.

For QK-Clip (Kimi K2, arXiv 2507.20534, section 2.1): to scale the logits of head h by gamma and leave those
of other heads alone, the rows of its projections are scaled by powers of gamma.

- Multi-head: queries and keys share it, gamma^1/2 each.
- Latent (MLA): the parts without position share it, gamma^1/2 each; the rotated key is one for all heads, so
  the rotated queries take all of gamma.
- Grouped queries, which K2 does not treat: heads share their keys, so queries take all of gamma.
- Models that normalise queries or keys after their projection undo any scaling of it, and the norm's own
  weight is one for all heads: refused. Such norms bound logits by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from k2rl.errors import ConfigError

_ATTENTION = re.compile(r"(?P<owner>.*\blayers\.(?P<layer>\d+)\.self_attn)\.(?P<leaf>\w+)(\.(weight|bias))?")
_SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj"}
_FUSED = {"qkv_proj", "o_proj"}
_LATENT = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
_LOW_RANK_QUERIES = {"q_a_proj", "q_a_layernorm", "q_b_proj"}
_NORM_SWITCHES = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm")


@dataclass(frozen=True)
class HeadRows:
    """Rows `[first + h * stride, + rows)` of parameters of head h of `layer`, scaled by gamma_h ** power."""

    layer: int
    #: Weight, and bias if there is one.
    parameters: tuple[str, ...]
    first: int
    stride: int
    rows: int
    power: float


def head_rows(names: Iterable[str], config: Any) -> tuple[HeadRows, ...]:
    """What to scale for QK-Clip in a model.

    Args:
        names: of its parameters.
        config: its transformers configuration.

    Raises:
        ConfigError: one line, if its attention is not one of those above.
    """
    names = set(names)
    leaves: dict[tuple[int, str], set[str]] = {}
    for name in names:
        if match := _ATTENTION.fullmatch(name):
            leaves.setdefault((int(match["layer"]), match["owner"]), set()).add(match["leaf"])
    refused = f"optimizer.qk_clip does not work for {config.model_type}"
    if len(leaves) != config.num_hidden_layers:
        raise ConfigError(f"{refused}: its attention layers are not all named …layers.<n>.self_attn")
    switch = next((name for name in _NORM_SWITCHES if getattr(config, name, False)), None)
    rules: list[HeadRows] = []
    for (layer, owner), found in sorted(leaves.items()):
        norms = sorted(leaf for leaf in found - _LATENT - _LOW_RANK_QUERIES if "norm" in leaf)
        if norms or switch:
            raise ConfigError(
                f"{refused}: it normalises queries and keys after their projection "
                f"({', '.join(norms) or switch}), which undoes the clip and bounds logits by itself; "
                "set optimizer.qk_clip=0"
            )
        parts = _parts(found, config)
        if parts is None:
            raise ConfigError(
                f"{refused}: the heads of an attention with {', '.join(sorted(found))} are not known; set "
                "optimizer.qk_clip=0"
            )
        for leaf, first, stride, rows, power in parts:
            both = (f"{owner}.{leaf}.{kind}" for kind in ("weight", "bias"))
            parameters = tuple(name for name in both if name in names)
            rules.append(HeadRows(layer, parameters, first, stride, rows, power))
    return tuple(rules)


def _parts(leaves: set[str], config: Any) -> list[tuple[str, int, int, int, float]] | None:
    """(projection, first row, stride, rows, power) as `HeadRows` has them; None for an unknown attention."""
    heads = config.num_attention_heads
    if leaves in (_LATENT | {"q_proj"}, _LATENT | _LOW_RANK_QUERIES):
        plain, rotated, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        query = "q_proj" if "q_proj" in leaves else "q_b_proj"
        return [
            (query, 0, plain + rotated, plain, 0.5),
            (query, plain, plain + rotated, rotated, 1.0),
            ("kv_b_proj", 0, plain + value, plain, 0.5),
        ]
    if leaves not in (_SEPARATE, _FUSED):
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    fused = leaves == _FUSED
    query, key = ("qkv_proj", "qkv_proj") if fused else ("q_proj", "k_proj")
    if config.num_key_value_heads != heads:
        return [(query, 0, size, size, 1.0)]
    return [(query, 0, size, size, 0.5), (key, heads * size if fused else 0, size, size, 0.5)]
