"""Final answers in a policy's text, and which split a problem belongs to."""

from __future__ import annotations

import hashlib
import re

from k2rl.types import Split

_NUMBER = re.compile(
    r"(?P<minus>(?<![\w.)])[-\u2212])?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![.\w])(?=\.[0-9]))"
    r"(?:\.(?P<decimals>[0-9]+))?"
)


def stated(text: str) -> str | None:
    """What follows the last `Answer:`, without spaces around it; None if nothing does."""
    _, said, answer = text.rpartition("Answer:")
    return answer.strip() or None if said else None


def last_number_is(text: str, answer: int) -> bool:
    """Whether the last number of a text is this integer; `1,234`, `1234.` and `1234.00` are all 1234."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return False
    sign, whole, decimals = numbers[-1].group("minus", "whole", "decimals")
    # Compared as text: a policy may write more digits than `int` is willing to read.
    digits = whole.replace(",", "").lstrip("0") or "0"
    return not (decimals or "").strip("0") and ("-" if sign and digits != "0" else "") + digits == str(answer)


def split_of(text: str, eval_one_in: int = 8) -> Split:
    """The split a problem belongs to, decided by what it is; a share of one in so many are for evaluation."""
    digest = hashlib.sha256(text.encode()).digest()
    return "eval" if int.from_bytes(digest[:4], "big") % eval_one_in == 0 else "train"
