"""The tiny random models: the same every time, and what they promise about tokens and templates."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from k2rl.models.hub import resolve_model
from k2rl.models.tiny import VOCAB_SIZE, build_model, build_tokenizer

TOKENIZER = build_tokenizer()
NAMES = ["tiny-qwen3", "tiny-llama-untied"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "calculator(2 + 3)"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "5"},
]


def test_vocabulary() -> None:
    assert len(TOKENIZER) == VOCAB_SIZE
    assert TOKENIZER.decode([TOKENIZER.eos_token_id]) == "<|im_end|>"
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    assert build_tokenizer().get_vocab() == TOKENIZER.get_vocab()


@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    if not any(token in TOKENIZER.all_special_ids for token in ids):
        assert TOKENIZER.decode(ids) == text


def test_template_is_prefix_stable() -> None:
    whole = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    for length in range(1, len(CHAT)):
        opening = CHAT[length]["role"] == "assistant"
        part = TOKENIZER.apply_chat_template(CHAT[:length], tokenize=False, add_generation_prompt=opening)
        assert whole.startswith(part)
    assert whole.endswith("<|im_start|>assistant\n5<|im_end|>\n")


@pytest.mark.parametrize("name", NAMES)
def test_same_weights_every_time(name: str) -> None:
    before = torch.random.get_rng_state()
    first, second = build_model(name, TOKENIZER), build_model(name, TOKENIZER)
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert 600_000 < first.num_parameters() < 800_000


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="huge"):
        build_model("huge", TOKENIZER)


@pytest.mark.parametrize(("name", "tied"), [("tiny-qwen3", True), ("tiny-llama-untied", False)])
def test_resolved_checkpoint(name: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2RL_HOME", str(tmp_path))
    folder = resolve_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == TOKENIZER.apply_chat_template(
        CHAT, tokenize=False
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == TOKENIZER.eos_token_id
    for name_, weight in build_model(name, TOKENIZER).state_dict().items():
        assert torch.equal(model.state_dict()[name_], weight)
