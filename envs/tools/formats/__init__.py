"""How the model families write tool calls; reading and writing, never raising."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from envs.tools.formats.base import Call, ChatFormat, Turn, as_json
from envs.tools.formats.hermes import CLOSE, OPEN, Hermes
from envs.tools.formats.kimi import Kimi
from envs.tools.formats.llama import Llama
from k2rl.types import Message, ToolSpec

FORMATS: dict[str, ChatFormat] = {format.name: format for format in (Hermes(), Llama(), Kimi())}
MARKERS = frozenset(marker for format in FORMATS.values() for marker in format.markers)
"""Special tokens that must stay in the text of a policy's turn for its calls to be read."""

__all__ = ["FORMATS", "MARKERS", "Call", "ChatFormat", "Turn", "format_of", "introduced", "parse", "written"]


def parse(text: str) -> Turn:
    """Read a turn in whichever format its first call is written; never raises."""
    return format_of(text).parse(text)


def format_of(text: str) -> ChatFormat:
    """The format of a turn's first call; Hermes's where there is none."""
    said = text.partition("</think>")[2] if text.lstrip().startswith("<think>") else text
    starts = {format.starts(said): format for format in reversed(FORMATS.values())}
    return min(
        ((start, format) for start, format in starts.items() if start >= 0),
        key=lambda found: found[0],
        default=(0, FORMATS["hermes"]),
    )[1]


def written(turn: str | Message) -> str:
    """A policy turn as text, its calls as Hermes writes them: for models whose template writes none."""
    if isinstance(turn, str):
        return turn
    return FORMATS["hermes"].render(turn.content, turn.tool_calls)


def introduced(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
    """The opening of a conversation with its tools in the system message: for models whose template has none.

    They are called as Hermes calls them.
    """
    if not tools:
        return tuple(messages)
    if messages and messages[0].role == "system":
        text = f"{messages[0].content}\n\n{_introduction(tools)}"
        return (msgspec.structs.replace(messages[0], content=text), *messages[1:])
    return (Message("system", _introduction(tools)), *messages)


def _introduction(tools: Sequence[ToolSpec]) -> str:
    listed = "\n".join(
        as_json({"name": tool.name, "description": tool.description, "parameters": tool.parameters})
        for tool in tools
    )
    return (
        f"You have these tools, each with the JSON schema of its arguments:\n{listed}\n"
        f'Call one by writing {OPEN}{{"name": NAME, "arguments": {{…}}}}{CLOSE}; a turn may hold several.'
    )
