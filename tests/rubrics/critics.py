"""Scripted judges: they read the prompt as a model would, and answer in its form."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from rubrics.models import Scripted


def material(text: str) -> tuple[dict[str, str], str]:
    """The blocks of a judge's prompt by name, and its token."""
    token = re.search(r"End with: VERDICT (\w+) ", text)[1]
    found = re.findall(rf"^<<<(.+?) {token}>>>\n(.*?)\n<<<END {token}>>>", text, re.DOTALL | re.MULTILINE)
    return dict(found), token


def critic(
    decide: Callable[[dict[str, str], random.Random], Mapping[str, Any]], says: str = "I looked."
) -> Scripted:
    """A model that decides on the material alone."""

    def reply(messages, seed):
        blocks, token = material(messages[-1].content)
        choices = decide(blocks, random.Random(f"{seed}/{messages[-1].content}"))
        return f"{says}\nVERDICT {token} {json.dumps(choices)}"

    return Scripted(reply)
