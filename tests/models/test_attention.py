"""What config.json alone says of a model's attention is what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2rl.errors import ConfigError
from k2rl.models.attention import _FULL_UNLESS_SAID, check_attention_config, says_full_attention
from k2rl.models.hub import resolve_model

SAID: list[dict[str, Any]] = [
    {},
    {"sliding_window": None},
    {"sliding_window": 128, "use_sliding_window": False},
    {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0},
    {"layer_types": ["full_attention"] * 2},
    {"layer_types": ["sliding_attention", "full_attention"]},
]


@pytest.mark.parametrize("said", SAID, ids=[" ".join(said) for said in SAID])
@pytest.mark.parametrize("family", sorted(_FULL_UNLESS_SAID))
def test_it_never_says_more_than_transformers(family: str, said: dict[str, Any], tmp_path: Path) -> None:
    config = {"model_type": family, "num_hidden_layers": 2, **said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        check_attention_config(tmp_path)
    except ConfigError:
        assert not says_full_attention(tmp_path)
    else:
        assert says_full_attention(tmp_path) or said


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama-untied", "tiny-deepseek"])
def test_it_knows_the_models_that_ship(name: str) -> None:
    assert says_full_attention(resolve_model(name))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_type": ["llama"]}', '{"model_type": "gemma3_text"}']
)
def test_what_it_does_not_know_it_does_not_say(text: str, tmp_path: Path) -> None:
    assert not says_full_attention(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert not says_full_attention(tmp_path)
