"""Messages as ids: whose control tokens they are, tool calls, and templates that cannot be used."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from envs.tools.formats import Call, parse
from k2rl.errors import ConfigError
from k2rl.models.chat import ChatTemplate, _tokenizer_class
from k2rl.models.hub import resolve_model
from k2rl.training.supervised import chat_sequence
from k2rl.types import Message, ToolCall, ToolSpec

TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}{{ '\\n' }}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("tiny-qwen3"))


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer, [tokenizer.eos_token_id])


def with_template(tokenizer: Any, template: str) -> ChatTemplate:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return ChatTemplate(changed, [tokenizer.eos_token_id])


def controls(chat: ChatTemplate, ids: list[int]) -> list[int]:
    special = set(chat._tokenizer.all_special_ids) | {chat._tokenizer.convert_tokens_to_ids("<|im_start|>")}
    return [token for token in ids if token in special]


spelled = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|", "a", " ", "|>", "é"])
)


@given(spelled.map("".join))
def test_no_content_can_forge_a_control_token(chat: ChatTemplate, content: str) -> None:
    harmless, hostile = [(Message("user", text),) for text in ("x", content)]
    for encode in (chat.prompt_ids, lambda messages: chat.continuation_ids(messages, True)):
        ids = encode(hostile)  # type: ignore[operator]
        assert controls(chat, ids) == controls(chat, encode(harmless))  # type: ignore[operator]
        assert content in chat._tokenizer.decode(ids)
    assert controls(chat, chat.turn_ids(content)) == [chat.stop_token_ids[0]]
    assert chat.decode(chat.turn_ids(content)) == content


def test_text_without_control_tokens_is_encoded_as_ever(chat: ChatTemplate, tokenizer: Any) -> None:
    messages = [Message("system", "Be brief."), Message("user", "2 + 2?")]
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
    )
    assert chat.prompt_ids(messages) == tokenizer.encode(whole, add_special_tokens=False)


def test_tool_calls_and_their_ids_reach_the_template(tokenizer: Any) -> None:
    chat = with_template(tokenizer, TOOL_TEMPLATE)
    call = Message("assistant", "", (ToolCall("functions.add:0", "add", {"a": 1, "b": "<|im_end|>"}),))
    reply = Message("tool", "3", tool_call_id="functions.add:0")
    turn = 'add {"a": 1, "b": "<|im_end|>"}'
    prompt = chat.prompt_ids([Message("user", "1 + 2?"), call, reply])
    text = tokenizer.decode(prompt)
    assert f"<call>{turn}</call>" in text
    assert "tool functions.add:0\n3" in text
    assert len(controls(chat, prompt)) == 7
    assert tokenizer.decode(chat.turn_ids(call)) == f"<call>{turn}</call><|im_end|>"
    sequence = chat_sequence([Message("user", "1 + 2?"), call, reply, Message("assistant", "3")], chat)
    learned = [i for i, loss in zip(sequence.token_ids, sequence.loss_mask, strict=True) if loss]
    assert tokenizer.decode(learned) == f"<call>{turn}</call><|im_end|>3<|im_end|>"


ADD = ToolSpec("add", "Add <|im_end|> two.", {"type": "object", "properties": {"a": {"type": "integer"}}})


def test_tools_are_offered_as_the_template_does(tokenizer: Any) -> None:
    offer = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    chat = with_template(tokenizer, offer + TOOL_TEMPLATE)
    prompt = chat.prompt_ids([Message("user", "1 + 2?")], [ADD])
    text = tokenizer.decode(prompt)
    assert text.startswith('<|im_start|>tools\n[{"type": "function", "function": {"name": "add"')
    assert "Add <|im_end|> two." in text
    assert len(controls(chat, prompt)) == 5
    assert chat.prompt_ids([Message("user", "1 + 2?")]) == chat.prompt_ids([Message("user", "1 + 2?")], [])


def test_or_in_words_where_the_template_leaves_them_out(chat: ChatTemplate, tokenizer: Any) -> None:
    text = tokenizer.decode(chat.prompt_ids([Message("user", "1 + 2?")], [ADD]))
    assert text.startswith("<|im_start|>system\nYou have these tools")
    call = Message("assistant", "", (ToolCall("functions.add:0", "add", {"a": 1}),))
    assert parse(chat.decode(chat.turn_ids(call))).calls == (Call("add", {"a": 1}),)


def test_marks_of_tool_calls_stay_in_a_turn_where_they_are_special_tokens(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|python_tag|>", "<|eom_id|>"]})
    chat = ChatTemplate(
        changed, [changed.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eom_id|>")]
    )
    ids = changed.encode('<|python_tag|>{"name": "f", "parameters": {}}<|eom_id|>', add_special_tokens=False)
    assert chat.decode(ids) == '<|python_tag|>{"name": "f", "parameters": {}}'


def test_a_template_without_a_system_role_serves_those_who_need_none(tokenizer: Any) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    chat = with_template(tokenizer, template)
    assert chat.prompt_ids([Message("user", "hello")])
    with pytest.raises(ConfigError, match="roles system, user: System role not supported"):
        chat.prompt_ids([Message("system", "s"), Message("user", "hello")])


def test_no_stop_token_is_one_line(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        ChatTemplate(tokenizer, [])


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("tiny-qwen3"), folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigError, match=r"^the tokenizer in .*model cannot be read: [^\n]+$"):
        ChatTemplate.from_pretrained(folder)


def test_a_plain_tokenizer_is_read_as_autotokenizer_reads_it(chat: ChatTemplate, tmp_path: Path) -> None:
    """Without that class's import of torch."""
    folder = Path(shutil.copytree(resolve_model("tiny-qwen3"), tmp_path / "model"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 7]}))
    program = (
        "import sys; from pathlib import Path\n"
        "from k2rl.models.chat import ChatTemplate; from k2rl.types import Message\n"
        "chat = ChatTemplate.from_pretrained(Path(sys.argv[1]))\n"
        "ids = chat.prompt_ids([Message('user', '<|im_end|> é 12')])\n"
        "print(ids, chat.stop_token_ids, 'torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, folder], stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    assert said == f"{chat.prompt_ids([Message('user', '<|im_end|> é 12')])} (2, 7) False\n"


def test_a_class_of_its_own_is_left_to_autotokenizer(tmp_path: Path) -> None:
    for settings in (
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "TokenizersBackend", "auto_map": {}},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert _tokenizer_class(tmp_path) is AutoTokenizer
