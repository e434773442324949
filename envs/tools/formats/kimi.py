"""Kimi K2: a section of calls, each with an id `functions.{name}:{index}` and JSON arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence

from envs.tools.formats.base import MAX_READ, Call, ChatFormat, Turn, after_space, as_json, read_json
from k2rl.types import ToolCall

SECTION, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?")


class Kimi(ChatFormat):
    """Calls have ids of their own, which tool messages name."""

    name = "kimi"
    markers = (SECTION, SECTION_END, CALL, ARGUMENTS, CALL_END)

    def starts(self, text: str) -> int:
        return text.find(SECTION)

    def _parse(self, text: str) -> Turn:
        start = text.find(SECTION)
        if start < 0:
            return Turn(text.strip())
        calls: list[Call] = []
        place = start + len(SECTION)
        while (opened := text.find(CALL, place)) >= 0:
            ended = text.find(SECTION_END, place)
            if 0 <= ended < opened or len(calls) == MAX_READ:
                break
            call, place = _read(text, opened + len(CALL))
            calls.append(call)
        ended = text.find(SECTION_END, place)
        rest = text[ended + len(SECTION_END) :] if ended >= 0 else ""
        if not calls:
            calls.append(Call("", problem=f"the section of tool calls has none: {CALL} begins one"))
        return Turn((text[:start] + rest).strip(), tuple(calls))

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        if not calls:
            return content
        written = (f"{CALL}{call.id}{ARGUMENTS}{as_json(call.arguments)}{CALL_END}" for call in calls)
        return f"{content}{SECTION}{''.join(written)}{SECTION_END}"


def _read(text: str, start: int) -> tuple[Call, int]:
    """The call whose mark ends at `start`, and where what follows it begins."""
    mark = text.find(ARGUMENTS, start)
    end = text.find(CALL_END, start)
    if mark < 0 or 0 <= end < mark:
        problem = f"a call is functions.NAME:INDEX{ARGUMENTS}{{…}}{CALL_END}"
        return Call("", problem=problem), end + len(CALL_END) if end >= 0 else len(text)
    id = text[start:mark].strip()
    found = _ID.fullmatch(id)
    name = found["name"] if found else ""
    value, after, problem = read_json(text, mark + len(ARGUMENTS))
    if problem:
        problem = f"the arguments are no JSON: {problem}"
    elif not isinstance(value, dict):
        problem = "the arguments are no JSON object"
    elif not name:
        problem = f"{id[:80]!r} is no id of a call; write functions.NAME:INDEX"
    after = after_space(text, after)
    closed = text.startswith((CALL_END, CALL, SECTION_END), after) or after == len(text)
    if not problem and not closed:
        problem = f"something other than {CALL_END} follows the arguments"
    if closed and not text.startswith(CALL_END, after):
        return Call(name, {} if problem else value, id or None, problem), after
    end = text.find(CALL_END, after)
    place = end + len(CALL_END) if end >= 0 else len(text)
    return Call(name, {} if problem else value, id or None, problem), place
