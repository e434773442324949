"""Llama 3.1: a turn that is JSON, `{"name": …, "parameters": {…}}`, or has it after `<|python_tag|>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from envs.tools.formats.base import MAX_READ, Call, ChatFormat, Turn, after_space, as_json, call_of, read_json
from k2rl.types import ToolCall

TAG = "<|python_tag|>"
_BETWEEN = re.compile(r"[\s;]*")
_OBJECT = re.compile(r'\s*\{\s*"(?:name|type|parameters|arguments)"\s*:')


class Llama(ChatFormat):
    """Calls are JSON objects with semicolons between them, and `parameters` for their arguments."""

    name = "llama"
    markers = (TAG,)

    def starts(self, text: str) -> int:
        return 0 if _OBJECT.match(text) else text.find(TAG)

    def _parse(self, text: str) -> Turn:
        start = self.starts(text)
        if start < 0:
            return Turn(text.strip())
        content = text[:start].strip()
        place = start + len(TAG) * text.startswith(TAG, start)
        calls: list[Call] = []
        while (place := after_space(text, place, _BETWEEN)) < len(text):
            value, place, problem = read_json(text, place)
            calls.append(call_of(value, problem, ("parameters", "arguments")))
            if calls[-1].problem or len(calls) == MAX_READ:
                break
        return Turn(content, tuple(calls))

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        if not calls:
            return content
        written = "; ".join(as_json({"name": call.name, "parameters": call.arguments}) for call in calls)
        return f"{content}{TAG}{written}" if content else written
