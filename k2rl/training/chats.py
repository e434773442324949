"""Chats to imitate, a JSON object a line: `{"messages": [...], "tools": [...]}`. No torch.

Messages and tools are read as Hugging Face data sets and OpenAI's API write them: calls as
`{"type": "function", "function": {"name": …, "arguments": …}}`, arguments as an object or as JSON text, tools
with their schema in `function`. The flat form of `k2rl.types` is read, too. Other columns of a row are left
alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from k2rl.errors import ConfigError
from k2rl.types import Message, Role, ToolCall, ToolSpec

SHIPPED = Path(__file__).with_name("curated.jsonl")
"""What `curated` means: short general chats, written for this project."""

FOLLOWS: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "user", "assistant"),
}
"""Who may speak after whom."""


class Chat(msgspec.Struct, frozen=True):
    """A conversation that ends with the assistant, and the tools that it had."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Function(msgspec.Struct):
    name: str
    arguments: dict[str, Any] | str = {}
    description: str = ""
    parameters: dict[str, Any] = {}


class _Callable(msgspec.Struct):
    """A call, or a tool: nested as OpenAI's, or flat."""

    id: str | None = None
    function: _Function | None = None
    name: str = ""
    arguments: dict[str, Any] | str = {}
    description: str = ""
    parameters: dict[str, Any] = {}

    @property
    def named(self) -> _Function:
        """Raises:
        ValueError: it has no name.
        """
        found = self.function or _Function(self.name, self.arguments, self.description, self.parameters)
        if not found.name:
            raise ValueError("a tool or a call has no name")
        return found


class _Message(msgspec.Struct):
    role: Role
    content: str | list[_Part] | None = None
    tool_calls: list[_Callable] | None = None
    tool_call_id: str | None = None


class _Row(msgspec.Struct):
    messages: list[_Message]
    tools: list[_Callable] | str | None = None


def load_chats(path: str | Path, key: str) -> list[Chat]:
    """Read and check a file of chats.

    A chat is user and assistant in turn, after at most one system message, with tool results between turns of
    the assistant, and ends with the assistant. Blank lines are skipped.

    Args:
        path: the file, or `curated` for the shipped set.
        key: of the configuration, that names the file.

    Raises:
        ConfigError: one line naming the file, and the line in it, that is wrong.
    """
    file = SHIPPED if str(path) == "curated" else Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}={path} is not a file; use `curated` for the shipped chats")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    chats = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not chats:
        raise ConfigError(f"{file}: no chats in it")
    return chats


def _parse(line: str, where: str) -> Chat:
    try:
        row = msgspec.json.decode(line, type=_Row)
        messages = tuple(_message(message) for message in row.messages)
        listed = (
            msgspec.json.decode(row.tools, type=list[_Callable]) if isinstance(row.tools, str) else row.tools
        )
        tools = tuple(_tool(tool) for tool in listed or ())
        _check(messages)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return Chat(messages, tools)


def _message(message: _Message) -> Message:
    calls = tuple(_call(call, index) for index, call in enumerate(message.tool_calls or ()))
    return Message(message.role, _text(message.content), calls, message.tool_call_id)


def _text(content: str | list[_Part] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    if other := [part.type for part in content if part.type != "text"]:
        raise ValueError(f"a message has a part of type {other[0]!r}; only text can be trained on")
    return "".join(part.text for part in content)


def _call(call: _Callable, index: int) -> ToolCall:
    found = call.named
    arguments = found.arguments
    if isinstance(arguments, str):
        arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    return ToolCall(call.id or f"functions.{found.name}:{index}", found.name, arguments)


def _tool(tool: _Callable) -> ToolSpec:
    found = tool.named
    parameters = found.parameters or {"type": "object", "properties": {}}
    return ToolSpec(found.name, found.description, parameters)


def _check(messages: tuple[Message, ...]) -> None:
    """Raises:
    ValueError: it is no chat.
    """
    roles = [message.role for message in messages]
    in_order = all(role in FOLLOWS[before] for before, role in zip(["", *roles], roles, strict=False))
    if not in_order or roles[-1:] != ["assistant"]:
        raise ValueError(
            "roles must be [system,] user, assistant, …, with tool results after the assistant, and end with "
            f"the assistant; they are: {', '.join(roles) or 'none'}"
        )
    calls: set[str] = set()
    for message in messages:
        if not (message.content.strip() or message.tool_calls or message.role == "tool"):
            raise ValueError(f"the {message.role} message is empty")
        calls |= {call.id for call in message.tool_calls}
        if message.tool_call_id is not None and calls and message.tool_call_id not in calls:
            raise ValueError(f"a tool result answers {message.tool_call_id!r}, which nobody has called")
