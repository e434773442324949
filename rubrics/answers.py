"""Where in an episode the answer is."""

from __future__ import annotations

import json
import re

from k2rl.types import Message, Trajectory

MOST_CHARACTERS = 200_000
"""Longer answers are none."""

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LINE = re.compile(
    r"^[ \t>*_#]*(?:final )?answer[ \t*_]*[:=][ \t*_]*(.+?)[ \t*_]*$", re.IGNORECASE | re.MULTILINE
)
PLACES = ("auto", "boxed", "tag", "line", "whole")


def final_text(trajectory: Trajectory) -> str:
    """The policy's last turn without its reasoning; empty if it never came to an answer."""
    last = next((m.content for m in reversed(trajectory.messages) if m.role == "assistant"), "")
    return without_reasoning(last)


def whole_response(trajectory: Trajectory) -> str:
    """All that the policy did, what it was answered, and its last turn; empty if it came to no answer."""
    final = final_text(trajectory)
    turns = [i for i, message in enumerate(trajectory.messages) if message.role == "assistant"]
    if not final or len(turns) == 1:
        return final
    return "\n".join([*map(_said, trajectory.messages[turns[0] : turns[-1]]), final])


def opening(trajectory: Trajectory) -> list[Message]:
    """The conversation before the policy's first turn, the same for all responses to a task."""
    roles = [message.role for message in trajectory.messages]
    return trajectory.messages[: roles.index("assistant") if "assistant" in roles else None]


def _said(message: Message) -> str:
    text = without_reasoning(message.content) if message.role == "assistant" else message.content
    calls = [f"{call.name}({json.dumps(call.arguments)})" for call in message.tool_calls]
    return f"{message.role}: {' '.join([text, *calls]).strip()}"


def without_reasoning(text: str) -> str:
    """What follows the last `</think>`; nothing, if reasoning began and did not end."""
    before, closed, after = text.rpartition("</think>")
    rest = after if closed else before + after
    return "" if "<think>" in rest or len(rest) > MOST_CHARACTERS else rest.strip()


def extract(text: str, place: str) -> str | None:
    """The answer in a text: in the last `boxed{…}`, the only <answer> tag, the last `Answer: …`, or all.

    `auto` takes the first of these that there is. None: there is none.

    Raises:
        ValueError: `place` is none of `PLACES`.
    """
    if place == "whole":
        return text or None
    if place == "boxed":
        return _boxed(text)
    if place == "tag":
        tags = _TAG.findall(text)
        return str(tags[0]).strip() or None if len(tags) == 1 else None
    if place == "line":
        lines = _LINE.findall(text)
        return str(lines[-1]).strip() or None if lines else None
    if place != "auto":
        raise ValueError(f"place={place!r} is none of: {', '.join(PLACES)}")
    found = (extract(text, each) for each in ("boxed", "tag", "line"))
    return next((answer for answer in found if answer is not None), None)


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for at in range(begin, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            return text[begin:at].strip() or None
    return None


def normalised(text: str) -> str:
    """Lower case, without outer punctuation, and with single spaces."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*")
