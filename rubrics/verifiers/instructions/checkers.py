"""The instructions there are: each tells of a text what is wrong with it, or nothing.

An instruction is `{"id": "words", "at_least": 50, "at_most": 60}`. Whatever `id` says is checked on the text
that a reader sees: characters without width don't count.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from k2rl.types import prepare
from rubrics.strict_json import strict_json, unfenced
from rubrics.verifiers.instructions import text as parts


class Instruction(msgspec.Struct, frozen=True, tag_field="id", forbid_unknown_fields=True):
    """What a text is told to be."""

    def problem(self, answer: str) -> str:
        """What is wrong; empty: nothing. An answer without a word does nothing that it was told."""
        raise NotImplementedError


class _Count(Instruction, frozen=True):
    """So many of something: `exactly`, or `at_least` and `at_most`."""

    exactly: int | None = None
    at_least: int | None = None
    at_most: int | None = None

    def __post_init__(self) -> None:
        bounds = [self.exactly, self.at_least, self.at_most]
        if all(bound is None for bound in bounds) or any(bound is not None and bound < 0 for bound in bounds):
            raise ValueError("it needs exactly, at_least or at_most, none of them negative")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least={self.at_least} is above at_most={self.at_most}")

    def problem(self, answer: str) -> str:
        found, noun = self.count(answer), type(self).__name__.lower()
        if self.exactly is not None and found != self.exactly:
            return f"{found} {noun} instead of {self.exactly}"
        if self.at_least is not None and found < self.at_least:
            return f"{found} {noun}, fewer than {self.at_least}"
        if self.at_most is not None and found > self.at_most:
            return f"{found} {noun}, more than {self.at_most}"
        return ""

    def count(self, answer: str) -> int:
        raise NotImplementedError


class Words(_Count, frozen=True, tag="words"):
    """Words."""

    def count(self, answer: str) -> int:
        return len(parts.words(answer))


class Characters(_Count, frozen=True, tag="characters"):
    """Characters that are seen, spaces included, but not around the text."""

    def count(self, answer: str) -> int:
        return len(parts.visible(answer).strip())


class Sentences(_Count, frozen=True, tag="sentences"):
    """Sentences."""

    def count(self, answer: str) -> int:
        return len(parts.sentences(answer))


class Paragraphs(_Count, frozen=True, tag="paragraphs"):
    """Paragraphs, parted by blank lines."""

    def count(self, answer: str) -> int:
        return len(parts.paragraphs(answer))


class Lines(_Count, frozen=True, tag="lines"):
    """Lines with a word in them."""

    def count(self, answer: str) -> int:
        return sum(bool(parts.words(line)) for line in answer.splitlines())


class Bullets(_Count, frozen=True, tag="bullets"):
    """Items of bullet lists."""

    def count(self, answer: str) -> int:
        return parts.bullets(answer)


class Numbered(_Count, frozen=True, tag="numbered"):
    """Items of numbered lists."""

    def count(self, answer: str) -> int:
        return parts.numbered(answer)


class Headings(_Count, frozen=True, tag="headings"):
    """Markdown headings."""

    def count(self, answer: str) -> int:
        return len(parts.headings(answer))


class Bold(_Count, frozen=True, tag="bold"):
    """Bold passages (`**so**`) with a word in them."""

    def count(self, answer: str) -> int:
        return sum(bool(parts.words(found)) for found in re.findall(r"\*\*([^*\n]+)\*\*", answer))


class Placeholders(_Count, frozen=True, tag="placeholders"):
    """Placeholders in square brackets: `[name]`."""

    def count(self, answer: str) -> int:
        return len(re.findall(r"\[[^\[\]\n]*\w[^\[\]\n]*\](?!\()", answer))


class Capitals(_Count, frozen=True, tag="capital_words"):
    """Words of two letters and more, all in capitals."""

    def count(self, answer: str) -> int:
        return sum(w.isupper() and sum(c.isalpha() for c in w) > 1 for w in parts.words(answer))


class Questions(_Count, frozen=True, tag="questions"):
    """Sentences that end in a question mark."""

    def count(self, answer: str) -> int:
        spans = parts.sentences(answer)
        return sum(answer[a:b].rstrip("\"'”’)*").endswith("?") for a, b in spans)


class Keyword(_Count, frozen=True, tag="keyword", kw_only=True):
    """How often a word or phrase occurs, whatever its case."""

    word: str

    def count(self, answer: str) -> int:
        return parts.occurrences(answer, self.word)


class Letter(_Count, frozen=True, tag="letter", kw_only=True):
    """How often a letter occurs, whatever its case."""

    letter: str

    def count(self, answer: str) -> int:
        return parts.visible(answer).casefold().count(self.letter.casefold())


class Contains(Instruction, frozen=True, tag="contains"):
    """All of these words and phrases are there."""

    words: list[str]

    def problem(self, answer: str) -> str:
        missing = [word for word in self.words if not parts.occurrences(answer, word)]
        return f"{missing[0]!r} is missing" if missing else ""


class Avoids(Instruction, frozen=True, tag="avoids"):
    """None of these words and phrases is there, not even spelled with invisible characters."""

    words: list[str]

    def problem(self, answer: str) -> str:
        present = [word for word in self.words if parts.occurrences(answer, word)]
        return f"{present[0]!r} is there" if present else ""


class StartsWith(Instruction, frozen=True, tag="starts_with"):
    """It begins so."""

    text: str

    def problem(self, answer: str) -> str:
        return "" if parts.visible(answer).strip().startswith(self.text) else "it begins otherwise"


class EndsWith(Instruction, frozen=True, tag="ends_with"):
    """It ends so."""

    text: str

    def problem(self, answer: str) -> str:
        return "" if parts.visible(answer).strip().endswith(self.text) else "it ends otherwise"


class Lowercase(Instruction, frozen=True, tag="lowercase"):
    """No capital letters."""

    def problem(self, answer: str) -> str:
        return "" if answer == answer.lower() else "it has capital letters"


class Uppercase(Instruction, frozen=True, tag="uppercase"):
    """No small letters."""

    def problem(self, answer: str) -> str:
        return "" if answer == answer.upper() else "it has small letters"


class NoCommas(Instruction, frozen=True, tag="no_commas"):
    """No commas, of whatever script."""

    def problem(self, answer: str) -> str:
        return "it has a comma" if re.search(r"[,，、،﹐﹑‚]", answer) else ""


class Quoted(Instruction, frozen=True, tag="quoted"):
    """The whole text is in double quotation marks."""

    def problem(self, answer: str) -> str:
        plain = answer.strip()
        pairs = [('"', '"'), ("“", "”")]
        inside = any(
            len(plain) > 2 and plain[0] == a and plain[-1] == b and not {a, b} & set(plain[1:-1])
            for a, b in pairs
        )
        return "" if inside else "it is not in quotation marks"


class Title(Instruction, frozen=True, tag="title"):
    """A title in double angle brackets, first: `<<title>>`."""

    def problem(self, answer: str) -> str:
        found = re.match(r"\s*<<([^<>\n]+)>>", answer)
        return "" if found and parts.words(found[1]) else "it does not begin with a <<title>>"


class Postscript(Instruction, frozen=True, tag="postscript"):
    """A last paragraph that begins with `marker` and says something."""

    marker: str = "P.S."

    def problem(self, answer: str) -> str:
        lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
        found = next((line for line in reversed(lines) if line.startswith(self.marker)), "")
        said = parts.words(found.removeprefix(self.marker))
        return "" if said and answer.count(self.marker) == 1 else f"no {self.marker} at the end"


class Json(Instruction, frozen=True, tag="json"):
    """JSON and nothing else, but for a code fence around it; with these keys, if any."""

    keys: list[str] = []

    def problem(self, answer: str) -> str:
        try:
            value = strict_json(unfenced(answer))
        except (ValueError, RecursionError):
            return "it is not JSON"
        missing = [key for key in self.keys if not isinstance(value, dict) or key not in value]
        return f"key {missing[0]!r} is missing" if missing else ""


class Sections(Instruction, frozen=True, tag="sections"):
    """Sections with these markdown headings, in this order, each with words in it."""

    names: list[str]

    def problem(self, answer: str) -> str:
        blocks = re.split(r"^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", answer, flags=re.MULTILINE)
        titles = [title.strip().casefold() for title in blocks[1::2]]
        if titles != [name.casefold() for name in self.names]:
            return f"its sections are: {', '.join(blocks[1::2])[:100] or 'none'}"
        empty = [name for name, body in zip(self.names, blocks[2::2], strict=True) if not parts.words(body)]
        return f"section {empty[0]!r} is empty" if empty else ""


class OneOf(Instruction, frozen=True, tag="one_of"):
    """It is one of these answers, word for word, and nothing else."""

    choices: list[str]

    def problem(self, answer: str) -> str:
        return "" if answer.strip() in self.choices else "it is none of the choices"


class Responses(Instruction, frozen=True, tag="responses"):
    """So many different answers, parted by a line of six asterisks."""

    count: int

    def problem(self, answer: str) -> str:
        blocks = [block.strip() for block in re.split(r"^[ \t]*\*{6}[ \t]*$", answer, flags=re.MULTILINE)]
        spoken = {" ".join(parts.words(block)).casefold() for block in blocks} - {""}
        right = len(blocks) == self.count == len(spoken)
        return "" if right else f"{len(spoken)} different answers instead of {self.count}"


class RepeatsPrompt(Instruction, frozen=True, tag="repeats_prompt"):
    """It begins with this text, word for word, and goes on from there."""

    prompt: str

    def problem(self, answer: str) -> str:
        given = answer.strip()
        if not given.startswith(self.prompt.strip()):
            return "it does not begin with the prompt"
        return "" if parts.words(given[len(self.prompt.strip()) :]) else "nothing follows the prompt"


class ParagraphStarts(Instruction, frozen=True, tag="paragraph_starts"):
    """Paragraph `number` (from 1) of exactly `of` begins with this word."""

    number: int
    of: int
    word: str

    def problem(self, answer: str) -> str:
        found = parts.paragraphs(answer)
        if len(found) != self.of:
            return f"{len(found)} paragraphs instead of {self.of}"
        first = parts.words(found[self.number - 1])[:1]
        same = [w.casefold() for w in first] == [self.word.casefold()]
        return "" if same else f"paragraph {self.number} begins otherwise"


class Alphabetical(Instruction, frozen=True, tag="alphabetical"):
    """The items of its bullet list are in alphabetical order; two or more, all different."""

    def problem(self, answer: str) -> str:
        items = re.findall(r"^[ \t]*[-*+•][ \t]+(.+?)[ \t]*$", answer, flags=re.MULTILINE)
        keys = [item.casefold() for item in items]
        if len(set(keys)) < 2:
            return "no list of two different items"
        return "" if keys == sorted(set(keys)) else "the list is not in order"


class Acrostic(Instruction, frozen=True, tag="acrostic"):
    """The first letters of its lines spell this word."""

    word: str

    def problem(self, answer: str) -> str:
        lines = [parts.words(line) for line in answer.splitlines()]
        spelled = "".join(line[0][0] for line in lines if line).casefold()
        long_enough = all(sum(map(len, line)) > 1 for line in lines if line)
        return "" if spelled == self.word.casefold() and long_enough else f"its lines spell {spelled[:40]!r}"


class WordLength(Instruction, frozen=True, tag="word_length"):
    """No word has more letters than this."""

    at_most: int

    def problem(self, answer: str) -> str:
        longest = max((len(word) for word in parts.words(answer)), default=0)
        return "" if longest <= self.at_most else f"a word of {longest} letters"


class Script(Instruction, frozen=True, tag="script"):
    """Nine in ten of its letters are of this script."""

    name: Literal["latin", "cyrillic", "greek", "cjk", "arabic", "devanagari"]

    def problem(self, answer: str) -> str:
        letters = [c for c in answer if c.isalpha()]
        inside = sum(any(a <= ord(c) <= b for a, b in SCRIPTS[self.name]) for c in letters)
        return "" if letters and inside >= 0.9 * len(letters) else f"{inside} of {len(letters)} letters"


SCRIPTS: dict[str, list[tuple[int, int]]] = {
    "latin": [(0x41, 0x24F), (0x1E00, 0x1EFF)],
    "cyrillic": [(0x400, 0x52F)],
    "greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "cjk": [(0x3040, 0x30FF), (0x3400, 0x9FFF), (0xAC00, 0xD7AF)],
    "arabic": [(0x600, 0x6FF), (0x750, 0x77F)],
    "devanagari": [(0x900, 0x97F)],
}

_ALL: tuple[type[Instruction], ...] = (
    *(Words, Characters, Sentences, Paragraphs, Lines, Bullets, Numbered, Headings, Bold, Placeholders),
    *(Capitals, Questions, Keyword, Letter, Contains, Avoids, StartsWith, EndsWith, Lowercase, Uppercase),
    *(NoCommas, Quoted, Title, Postscript, Json, Sections, OneOf, Responses, RepeatsPrompt, ParagraphStarts),
    *(Alphabetical, Acrostic, WordLength, Script),
)
CHECKERS: dict[str, type[Instruction]] = {str(kind.__struct_config__.tag): kind for kind in _ALL}


def instruction(spec: Any) -> Instruction:
    """An instruction of its JSON.

    Raises:
        ValueError: one line, about what is wrong with it.
    """
    id = spec.get("id") if isinstance(spec, dict) else None
    if id not in CHECKERS:
        raise ValueError(f"instruction {id!r} is none of: {', '.join(CHECKERS)}")
    try:
        return msgspec.convert(spec, CHECKERS[id])
    except msgspec.ValidationError as error:
        raise ValueError(f"instruction {id!r}: {error}") from error


prepare(*CHECKERS.values())
