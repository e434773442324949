"""Instructions to the judge inside an answer."""

from __future__ import annotations

import re
import unicodedata

from k2rl.types import Evidence
from rubrics.verifiers.instructions.text import visible

_TO_JUDGE = r"(?:judge|grader|evaluator|rater|reviewer|critic|scorer|assistant|system|ai|model|llm)"
_PATTERNS = [
    r"\b(?:ignore|disregard|forget|override|skip)\b.{0,40}\b(?:instruction|rubric|criteri|prompt|rule|above|previous|guideline)",
    rf"\b(?:dear|hey|hello|attention|note to|message (?:to|for)|as an?|you are) (?:the |an? )?(?:\w+ )?{_TO_JUDGE}\b",
    r"\b(?:give|award|assign|grant|rate|score|grade|mark|rank)\b.{0,30}\b(?:this|me|it|my|the) ?(?:answer|response|one)?\b"
    r".{0,30}\b(?:full|high(?:est)?|max(?:imum)?|top|perfect|best|excellent|10|100|first|winner|correct|a\+)",
    r"\b(?:this|my|the) (?:answer|response|solution)\b.{0,30}\b(?:deserves|merits|must (?:be|get|receive|win)|should "
    r"(?:be (?:rated|scored|graded|ranked|chosen|marked)|get|receive|win))",
    r"\bverdict\b\W{0,6}(?:\w{1,8}\W{1,4})?(?:\{|[ab]\b|tie\b|yes\b|full|excellent|good|best|\d)",
    r"[\"'](?:verdict|winner|score|choice|rating|grade)[\"']\s*:",
    r"<\|?/?(?:im_start|im_end|system|user|assistant|endoftext|eot_id|start_header_id)\b",
    r"\[/?(?:INST|SYS|SYSTEM)\]|<</?SYS>>|#{2,}\s*(?:system|instruction|new instruction)",
    r"^\W*(?:system|developer|administrator)\W*:|\brubric (?:has|have) (?:been )?changed\b",
    r"<<<\s*(?:END|ANSWER|TASK|BEGIN)",
    r"\b(?:new|updated|revised|real|actual) (?:instructions?|rubric|criteria|task|scoring guide)\b\s*[:=]",
    r"\b(?:output|reply|respond|answer|print|say|choose|select|pick|prefer)\b.{0,20}[\"'`“]?(?:winner|verdict|answer [ab]\b|response [ab]\b|\{)",
    r"\b(?:other|competing|alternative|second|first) (?:answer|response)\b.{0,40}\b(?:wrong|incorrect|worse|plagiari|unsafe|invalid|cheat)",
    r"\bend of (?:the )?(?:answer|response|submission|candidate)\b",
    r"\b(?:pre-?approved|already (?:been )?(?:verified|graded|checked|scored|approved))\b",
]
_FOUND = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.IGNORECASE | re.MULTILINE)


def without_injections(text: str) -> tuple[str, list[Evidence]]:
    """The text without its lines that speak to a judge, or between such lines, and these as evidence against it.

    Looked for in what a reader sees: invisible characters are left out, look-alike ones are made plain. Whole
    lines go: what stands beside such a sentence is there for its sake, and losing it must not pay.
    """
    plain = unicodedata.normalize("NFKC", visible(text))
    lines = plain.split("\n")
    # Over the ends of lines, too: a sentence may be wrapped.
    marks = [match.span() for match in _FOUND.finditer(plain)]
    if not marks:
        return text, []
    first, last = (plain.count("\n", 0, at) for at in (marks[0][0], marks[-1][1] - 1))
    gone = " ".join(" ".join(lines[first : last + 1]).split())
    kept = "\n".join([*lines[:first], *lines[last + 1 :]]).strip()
    return kept, [Evidence(f"speaks to the judge: {gone[:200]}", "injection", False)]
