"""Whether texts to imitate hold what a model is evaluated on. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from k2rl.types import Task

SPAN = 13
"""Words in a row that two texts do not share by chance, as GPT-3's report has it (arXiv 2005.14165, C)."""
SHORTEST = 5
"""Words of a text that is looked for as a whole; shorter ones (`yes`, a number) are anywhere."""

_WORD = re.compile(r"\w+")


def find_overlap(texts: Sequence[str], tasks: Sequence[Task]) -> tuple[int, Task, str] | None:
    """The first text that holds a part of a task: its index, the task, words that both have.

    Looked for are all strings in the tasks' data: `SPAN` words in a row, or the whole of shorter ones.
    Case and what stands between words do not count.
    """
    wanted: dict[tuple[str, ...], Task] = {}
    for task in tasks:
        for string in _strings(task.data):
            for span in _spans(_words(string), SPAN):
                wanted.setdefault(span, task)
    lengths = sorted({len(span) for span in wanted})
    for index, text in enumerate(texts):
        words = _words(text)
        for length in lengths:
            for start in range(len(words) - length + 1):
                span = tuple(words[start : start + length])
                if span in wanted:
                    return index, wanted[span], " ".join(span)
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _spans(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    """All runs of so many words; the whole of a shorter text, if it is long enough to mean something."""
    if len(words) < length:
        if len(words) >= SHORTEST:
            yield tuple(words)
        return
    for start in range(len(words) - length + 1):
        yield tuple(words[start : start + length])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
