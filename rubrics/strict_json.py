"""JSON as the standard has it, of texts that nobody trusts."""

from __future__ import annotations

import json
import re
from typing import Any

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


def unfenced(text: str) -> str:
    """What stands in a code fence, if the text is one and nothing else."""
    fenced = _FENCE.fullmatch(text.strip())
    return fenced[1] if fenced else text


def strict_json(text: str) -> Any:
    """JSON without what Python would take beyond it: NaN, infinity, a key twice.

    Raises:
        ValueError: it is not.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key twice in one object")
        return found

    def refused(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refused)
