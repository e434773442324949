"""What an answer says of itself, and whether it is so: `I used exactly 50 words` is not done by saying it."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from k2rl.types import Evidence
from rubrics.verifiers.instructions import checkers, text

_NUMBERS = {
    name: value
    for value, name in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
_N = r"(?P<n>\d{1,5}|" + "|".join(_NUMBERS) + r")"
_SELF = (
    r"\b(?:this|the|my|above)\s+(?:\w+\s+){0,2}?(?:response|answer|text|essay|poem|story|summary|list|email"
    r"|letter|reply|piece|version|description|post)\b[^.!?\n]{0,30}?|\bthis\b\s*"
    r"|\bI(?:['’]ve| have)?\b[^.!?\n]{0,30}?"
)
_HOW = r"(?P<how>exactly|precisely|at least|at most|no more than|fewer than|under|only|just)?\s*"

_COUNTED: dict[str, type[checkers._Count]] = {
    "word": checkers.Words,
    "sentence": checkers.Sentences,
    "paragraph": checkers.Paragraphs,
    "bullet point": checkers.Bullets,
    "bullet": checkers.Bullets,
    "line": checkers.Lines,
    "character": checkers.Characters,
}
_COUNT = re.compile(
    rf"(?:{_SELF})(?:is|are|has|have|contains?|used?|uses|wrote|written in|kept|keeps?|consists? of|in)\s+"
    rf"(?:it (?:to|at|under) )?{_HOW}{_N}[ -](?P<noun>{'|'.join(_COUNTED)})s?\b(?:\s+(?:long|in total))?",
    re.IGNORECASE,
)
_PAREN = re.compile(
    r"[\[(*](?:word count|total words?|words?)\s*[:=]\s*(?P<n>\d{1,5})|[\[(*](?P<m>\d{1,5}) words?[\])*]",
    re.IGNORECASE,
)
_FORMS: list[tuple[re.Pattern[str], Callable[[], checkers.Instruction]]] = [
    (re.compile(r"\b(?:no|without(?: any)?|avoided(?: all| using)?|zero) commas\b", re.I), checkers.NoCommas),
    (
        re.compile(r"\b(?:all|only|entirely|in) (?:in )?(?:lowercase|lower case|small letters)\b", re.I),
        checkers.Lowercase,
    ),
    (
        re.compile(
            r"\b(?:all|only|entirely|in) (?:in )?(?:uppercase|upper case|capital letters|capitals)\b", re.I
        ),
        checkers.Uppercase,
    ),
    (re.compile(r"\b(?:valid|only|pure) JSON\b"), checkers.Json),
]
_FORM_SELF = re.compile(
    r"\b(?:I|this|my|above|response|answer|text|requested|written|wrote)\b", re.IGNORECASE
)


class Claim(msgspec.Struct, frozen=True):
    """A sentence in which the answer speaks of itself, and what is wrong with that; empty: it is so."""

    text: str
    span: tuple[int, int]
    problem: str


def claims(answer: str) -> list[Claim]:
    """What an answer claims of its own form. Counts may leave the claiming sentence out."""
    found = []
    for start, end in text.sentences(answer):
        sentence = answer[start:end]
        instructions = list(_claimed(sentence))
        if not instructions:
            continue
        rest = (answer[:start] + answer[end:]).strip()
        for instruction in instructions:
            problem = instruction.problem(answer)
            if problem and rest and not instruction.problem(rest):
                problem = ""
            found.append(Claim(sentence, (start, end), problem))
    return found


def false_claims(answer: str) -> list[Evidence]:
    """The claims that are not so, as evidence against the answer."""
    return [
        Evidence(f"claims {c.text!r:.120}: {c.problem}", "claims", False, c.span)
        for c in claims(answer)
        if c.problem
    ]


def _claimed(sentence: str) -> list[checkers.Instruction]:
    found: list[checkers.Instruction] = []
    for match in _COUNT.finditer(sentence):
        n = match["n"].lower()
        number = int(n) if n.isdecimal() else _NUMBERS[n]
        found.append(_COUNTED[match["noun"].lower()](**_bound(match["how"], number)))
    found += [checkers.Words(exactly=int(m["n"] or m["m"])) for m in _PAREN.finditer(sentence)]
    for pattern, make in _FORMS:
        if pattern.search(sentence) and _FORM_SELF.search(sentence):
            found.append(make())
    return found


def _bound(how: str | None, number: int) -> dict[str, int]:
    match (how or "exactly").lower():
        case "at least":
            return {"at_least": number}
        case "at most" | "no more than":
            return {"at_most": number}
        case "fewer than" | "under":
            return {"at_most": max(0, number - 1)}
    return {"exactly": number}
