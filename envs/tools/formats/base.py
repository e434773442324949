"""What a chat format is: how a model writes tool calls into the text of its turn."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from k2rl.types import ToolCall

MAX_READ = 64
"""Calls of one turn that are read; what follows them is left out."""
SHAPE = '{"name": …, "arguments": {…}}'


class Call(msgspec.Struct, frozen=True):
    """A tool call as it was written: `problem` says what is wrong with its form, if anything is.

    `id` is None where the format has none; the tool's name may be that of no tool.
    """

    name: str
    arguments: dict[str, Any] = {}
    id: str | None = None
    problem: str = ""


class Turn(msgspec.Struct, frozen=True):
    """A policy turn, read: what it says, and its calls in the order they were written."""

    content: str
    calls: tuple[Call, ...] = ()


class ChatFormat(ABC):
    """Reads and writes the turns of a family of models."""

    name: str
    #: Texts that a tokenizer may have as special tokens; without them a call could not be read.
    markers: tuple[str, ...] = ()

    def parse(self, text: str) -> Turn:
        """Read a turn, whatever it is; never raises. A leading `<think>` block calls nothing."""
        if not text.lstrip().startswith("<think>"):
            return self._parse(text)
        thought, closed, said = text.partition("</think>")
        turn = self._parse(said) if closed else Turn("")
        return Turn((thought + closed + turn.content).strip(), turn.calls)

    @abstractmethod
    def starts(self, text: str) -> int:
        """Where the first call of a turn begins, or -1."""

    @abstractmethod
    def _parse(self, text: str) -> Turn: ...

    @abstractmethod
    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """A turn as the model writes it; `parse` reads it back, unless `content` itself spells a call."""


class _NoJSONError(ValueError):
    """A text that is not the JSON it should be."""


def _no_constant(name: str) -> Any:
    raise _NoJSONError(f"{name} is no JSON")


#: Line breaks in strings, which models like to write as they are, are taken.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


def read_json(text: str, start: int) -> tuple[Any, int, str]:
    """The JSON value that begins at `start` or after spaces there, where it ends, and what is wrong with it.

    The value is None and the end is `start` if something is wrong.
    """
    start = after_space(text, start)
    try:
        value, end = _DECODER.raw_decode(text, start)
        # Lone surrogates can be spelled in JSON, but are no text that a tool could store or send.
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, start, f"{error.msg} at character {error.pos - start}"
    except UnicodeEncodeError:
        return None, start, "half a surrogate pair is no character"
    except RecursionError:
        return None, start, "too deeply nested"
    except ValueError as error:  # numbers of more digits than Python reads, NaN
        return None, start, str(error).split(";")[0]
    return value, end, ""


def call_of(value: Any, problem: str, arguments: tuple[str, ...] = ("arguments",)) -> Call:
    """The call that a JSON object spells; its arguments may stand under any of these keys."""
    if problem:
        return Call("", problem=f"the call is no JSON: {problem}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call("", problem=f"a call is one JSON object: {SHAPE}")
    given: Any = next((value[key] for key in arguments if key in value), {})
    if not isinstance(given, dict):
        return Call(value["name"], problem="the arguments are no JSON object")
    return Call(value["name"], given)


def after_space(text: str, start: int, space: re.Pattern[str] = re.compile(r"\s*")) -> int:
    """The first place from `start` on that is no space."""
    found = space.match(text, start)
    return found.end() if found else start


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
