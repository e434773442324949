"""What a text is made of: words, sentences, paragraphs, lists."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W_]+(?:['’\-–.,][^\W_]+)*", re.UNICODE)
_SENTENCE_END = re.compile(r"(?<=[.!?…])([\"'”’)\]]*)\s+(?=[\"'“‘(\[]?[A-ZÀ-Þ0-9])")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|No|Fig|approx|[A-Z])\.[\"'”’)]*$")
_BULLET = re.compile(r"^[ \t]*(?:[-*+•])[ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+\S", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t]+\S.*$", re.MULTILINE)
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]")


def visible(text: str) -> str:
    """The text without characters that nobody sees."""
    return _INVISIBLE.sub("", text)


def words(text: str) -> list[str]:
    """Its words; `it's`, `well-known` and `3.5` are one each."""
    return _WORD.findall(visible(text))


def sentences(text: str) -> list[tuple[int, int]]:
    """Where its sentences are: from and up to, without the space around them."""
    found: list[tuple[int, int]] = []
    for line in re.finditer(r"[^\n]+", text):
        start = line.start()
        ends = list(_SENTENCE_END.finditer(text, line.start(), line.end()))
        for match in ends:
            if not _ABBREVIATION.search(text[start : match.end(1)]):
                found.append((start, match.end(1)))
                start = match.end()
        found.append((start, line.end()))
    stripped = []
    for begin, end in found:
        piece = text[begin:end]
        begin += len(piece) - len(piece.lstrip())
        end -= len(piece) - len(piece.rstrip())
        if words(text[begin:end]):
            stripped.append((begin, end))
    return stripped


def paragraphs(text: str) -> list[str]:
    """Blocks with a word in them that blank lines part."""
    return [block.strip() for block in re.split(r"\n[ \t]*\n", text) if words(block)]


def bullets(text: str) -> int:
    return len(_BULLET.findall(text))


def numbered(text: str) -> int:
    return len(_NUMBERED.findall(text))


def headings(text: str) -> list[str]:
    return [match.lstrip("#").strip() for match in _HEADING.findall(text)]


def occurrences(text: str, phrase: str) -> int:
    """How often a word or phrase stands in a text, whatever its case; not within longer words."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", visible(text), re.IGNORECASE))
