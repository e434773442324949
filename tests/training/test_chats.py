"""The curated chats, and what is said about files that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2rl.errors import ConfigError
from k2rl.training.chats import load_chats

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}'


def test_the_shipped_chats_are_many_short_and_different() -> None:
    chats = load_chats("curated")
    assert len(chats) >= 40
    assert len({chat[-2].content for chat in chats}) == len(chats)
    assert all(len(chat[-1].content.split()) <= 35 for chat in chats)
    assert {chat[0].role for chat in chats} == {"system", "user"}


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{GOOD}\n\n{GOOD}\n")
    assert [message.content for chat in load_chats(file) for message in chat] == ["Hi", "Hello."] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "Invalid enum value 'robot'"),
        ('{"messages": [{"role": "user"}]}', "missing required field `content`"),
        ('{"messages": [], "text": "x"}', "unknown field `text`"),
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
        load_chats(file)
    assert str(raised.value).startswith(f"{file}:2: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_without_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_chats(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no chats"):
        load_chats(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_chats(tmp_path / "binary.jsonl")
