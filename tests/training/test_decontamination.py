"""Texts to imitate that hold evaluation tasks are found, and others are not."""

from __future__ import annotations

from typing import Any

import pytest

from k2rl.training.chats import load_chats
from k2rl.training.decontamination import SHORTEST, SPAN, find_overlap
from k2rl.types import Task

LONG = "Ada has 12 apples and buys 30 more at the market. How many apples does Ada have now?"


def task(**data: Any) -> Task:
    return Task("t", "e", "k", "eval", 0, data)


@pytest.mark.parametrize(
    ("text", "data", "found"),
    [
        (f"user\n{LONG}\nassistant\n42", {"question": LONG}, True),
        ("ada HAS 12 apples, and buys 30 more at the market! How many", {"question": LONG}, True),
        (
            "Ada has 12 apples and buys 31 more at the market. How many apples does Ada have?",
            {"question": LONG},
            False,
        ),
        ("How many apples does Ada have now?", {"question": LONG}, False),
        ("They asked: who wrote the first novel?", {"turns": [{"text": "Who wrote the first novel?"}]}, True),
        ("42 is the answer", {"answer": "42", "numbers": [4, 2]}, False),
        ("", {"question": LONG}, False),
    ],
)
def test_what_overlaps(text: str, data: dict[str, Any], found: bool) -> None:
    overlap = find_overlap(["Something else.", text], [task(**data)])
    assert (overlap is not None) == found
    if overlap is not None:
        index, which, words = overlap
        assert (index, which.id) == (1, "t")
        assert SHORTEST <= len(words.split()) <= SPAN


def test_the_shipped_chats_hold_none_of_the_shipped_tasks() -> None:
    from itertools import islice

    import envs

    texts = ["\n".join(m.content for m in chat.messages) for chat in load_chats("curated", "ptx.path")]
    for name in ("calculator", "twenty_four", "sudoku", "comparison"):
        assert find_overlap(texts, list(islice(envs.make(name).tasks("eval", 0), 64))) is None
