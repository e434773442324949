"""The curated chats, and what is said about files that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2rl.errors import ConfigError
from k2rl.training.chats import load_chats
from k2rl.types import ToolCall, ToolSpec

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'


def test_the_shipped_chats_are_many_short_and_different() -> None:
    chats = [chat.messages for chat in load_chats("curated", "ptx.path")]
    assert len(chats) >= 40
    assert len({chat[-2].content for chat in chats}) == len(chats)
    assert all(len(chat[-1].content.split()) <= 35 for chat in chats)
    assert {chat[0].role for chat in chats} == {"system", "user"}


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{GOOD}\n\n{GOOD}\n")
    assert [message.content for chat in load_chats(file, "data.path") for message in chat.messages] == [
        "Hi",
        "Hello.",
    ] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "Invalid enum value 'robot'"),
        (GOOD.replace("Hi", ""), "the user message is empty"),
        ('{"text": "x"}', "missing required field `messages`"),
        (GOOD.replace('"Hi"', '[{"type": "image", "url": "x"}]'), "a part of type 'image'"),
        (
            GOOD.replace('"Hello."', 'null, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]'),
            "trunc",
        ),
        (GOOD.replace('"Hello."', 'null, "tool_calls": [{"id": "a"}]'), "a call has no name"),
        (GOOD.replace("]}", '], "tools": "[1]"}'), "Expected `object`, got `int`"),
        ('{"messages": []}', "they are: none"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "they are: system"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "they are: user"),
        (GOOD.replace("Hello.", " "), "assistant message is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ConfigError) as raised:
        load_chats(file, "data.path")
    assert str(raised.value).startswith(f"{file}:2: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
    }
]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}},
            {"id": "b", "type": "function", "function": {"name": "add", "arguments": {"x": 2}}},
        ],
    },
    {"role": "tool", "content": "3", "tool_call_id": "a", "name": "add"},
    {"role": "tool", "content": "", "tool_call_id": "b"},
    {"role": "assistant", "content": "3", "tool_calls": None},
]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["objects", "text"])
def test_calls_are_read_as_data_sets_write_them(tmp_path: Path, tools: object) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"source": "a set", "messages": CALLS, "tools": tools}))
    (chat,) = load_chats(file, "data.path")
    assert chat.tools == (ToolSpec("add", "Adds.", {"type": "object"}),)
    assert chat.messages[0].content == "1 + 2?"
    assert chat.messages[1].tool_calls == (
        ToolCall("a", "add", {"x": 1, "y": 2}),
        ToolCall("b", "add", {"x": 2}),
    )
    assert [message.tool_call_id for message in chat.messages] == [None, None, "a", "b", None]


def test_a_result_of_a_call_that_nobody_made_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [*CALLS[:2], {**CALLS[2], "tool_call_id": "c"}, CALLS[4]]}))
    with pytest.raises(ConfigError, match="answers 'c', which nobody has called"):
        load_chats(file, "data.path")


def test_files_without_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_chats(tmp_path / "none.jsonl", "data.path")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no chats"):
        load_chats(tmp_path / "empty.jsonl", "data.path")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_chats(tmp_path / "binary.jsonl", "data.path")
