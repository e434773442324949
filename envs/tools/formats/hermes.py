"""Hermes, Qwen and all who follow them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Sequence

from envs.tools.formats.base import MAX_READ, Call, ChatFormat, Turn, after_space, as_json, call_of, read_json
from k2rl.types import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ChatFormat):
    """One tagged JSON object a call, after what the turn says."""

    name = "hermes"
    markers = (OPEN, CLOSE)

    def starts(self, text: str) -> int:
        return text.find(OPEN)

    def _parse(self, text: str) -> Turn:
        said: list[str] = []
        calls: list[Call] = []
        place = 0
        while (start := text.find(OPEN, place)) >= 0 and len(calls) < MAX_READ:
            said.append(text[place:start])
            call, place = _read(text, start + len(OPEN))
            calls.append(call)
        said.append(text[place:] if start < 0 else "")
        return Turn("".join(said).strip(), tuple(calls))

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        written = [
            f"{OPEN}\n{as_json({'name': call.name, 'arguments': call.arguments})}\n{CLOSE}" for call in calls
        ]
        return "\n".join([content] * bool(content) + written)


def _read(text: str, start: int) -> tuple[Call, int]:
    """The call whose tag ends at `start`, and where what follows it begins."""
    value, end, problem = read_json(text, start)
    call = call_of(value, problem)
    rest = after_space(text, end)
    if text.startswith(CLOSE, rest):
        return call, rest + len(CLOSE)
    if not problem and (rest == len(text) or text.startswith(OPEN, rest)):
        return call, rest  # a forgotten closing tag
    if not call.problem:
        call = Call(call.name, problem=f"something other than {CLOSE} follows the JSON object")
    close, following = text.find(CLOSE, end), text.find(OPEN, end)
    if close >= 0 and (following < 0 or close < following):
        return call, close + len(CLOSE)
    return call, following if following >= 0 else len(text)
