"""Curated chats for the PTX loss, one `{"messages": [{"role": …, "content": …}, …]}` a line. No torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from k2rl.errors import ConfigError
from k2rl.types import Message

SHIPPED = Path(__file__).with_name("curated.jsonl")
"""What `ptx.path=curated` means: short general chats, written for this project."""


class _Chat(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[Message]


def load_chats(path: str | Path) -> list[list[Message]]:
    """Read and check a file of chats.

    A chat is user and assistant in turn, after at most one system message, and ends with the assistant.
    Blank lines are skipped.

    Args:
        path: the file, or `curated` for the shipped set.

    Raises:
        ConfigError: one line naming the file, and the line in it, that is wrong.
    """
    file = SHIPPED if str(path) == "curated" else Path(path)
    if not file.is_file():
        raise ConfigError(f"ptx.path={path} is not a file; use `curated` for the shipped chats")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    chats = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not chats:
        raise ConfigError(f"{file}: no chats in it")
    return chats


def _parse(line: str, where: str) -> list[Message]:
    try:
        messages = msgspec.json.decode(line, type=_Chat).messages
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}") from error
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [message.role for message in turns] != expected:
        roles = ", ".join(message.role for message in messages) or "none"
        raise ConfigError(f"{where}: roles must be [system,] user, assistant, …; they are: {roles}")
    if empty := [message.role for message in messages if not message.content.strip()]:
        raise ConfigError(f"{where}: the {empty[0]} message is empty")
    return messages
