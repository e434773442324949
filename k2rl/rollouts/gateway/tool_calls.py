"""Tool calls in the text of a turn, as Hermes and Qwen models write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from k2rl.types import Message, ToolCall

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_INTRODUCTION = """\
You may call functions. Their signatures:
<tools>
{signatures}
</tools>
For each call write a JSON object with the function's name and its arguments:
<tool_call>
{{"name": NAME, "arguments": {{…}}}}
</tool_call>"""


class _Written(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}


def parse(text: str, first: int) -> tuple[str, tuple[ToolCall, ...]]:
    """A turn without its calls, and the calls; those that cannot be read stay in the text.

    Args:
        text: the turn.
        first: number of the first call in the conversation; ids are K2's, `functions.{name}:{number}`.
    """
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        try:
            written = msgspec.json.decode(found[1], type=_Written)
        except msgspec.MsgspecError:
            return found[0]
        calls.append(
            ToolCall(f"functions.{written.name}:{first + len(calls)}", written.name, written.arguments)
        )
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else text), tuple(calls)


def spelled(message: Message) -> Message:
    """A message whose calls are in its text, for a template that does not know calls."""
    if not message.tool_calls:
        return message
    written = [msgspec.json.encode(_Written(call.name, call.arguments)) for call in message.tool_calls]
    calls = [f"<tool_call>\n{call.decode()}\n</tool_call>" for call in written]
    return Message(message.role, "\n".join([message.content, *calls]).strip())


def introduced(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages with a description of the tools in their system message, for a template that has none."""
    signatures = "\n".join(msgspec.json.encode(tool).decode() for tool in tools)
    text = _INTRODUCTION.format(signatures=signatures)
    first = messages[0]
    if first.role == "system":
        return [Message("system", f"{first.content}\n\n{text}".strip()), *messages[1:]]
    return [Message("system", text), *messages]
