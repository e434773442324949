"""Instructions: for each one a text that follows it and one that does not, and false claims of having done so."""

from __future__ import annotations

import pytest

from rubrics.verifiers.instructions import CHECKERS, InstructionJudge
from rubrics.verifiers.instructions.checkers import instruction
from rubrics.verifiers.instructions.claims import claims
from rubrics.verifiers.instructions.text import sentences, words
from tests.rubrics.judging import judged

#: For every instruction: followed by, not followed by.
TABLE = [
    ({"id": "words", "exactly": 3}, "It's well-known stuff.", "One two three four."),
    ({"id": "words", "at_least": 2, "at_most": 3}, "a b", "a"),
    ({"id": "characters", "at_most": 5}, " abcde ", "abcdef"),
    ({"id": "sentences", "exactly": 2}, "Dr. Wu came. He left.", "Dr. Wu came."),
    ({"id": "paragraphs", "exactly": 2}, "One.\n\nTwo.", "One.\nTwo.\n\n   \n"),
    ({"id": "lines", "exactly": 2}, "a\n\nb", "a b"),
    ({"id": "bullets", "at_least": 2}, "- a\n* b", "-a\n-b"),
    ({"id": "numbered", "exactly": 2}, "1. a\n2) b", "1 a\n2 b"),
    ({"id": "headings", "exactly": 1}, "# A\ntext", "#A\ntext"),
    ({"id": "bold", "at_least": 1}, "so **very** much", "so ** ** much"),
    ({"id": "placeholders", "at_least": 2}, "Dear [name], [date]", "Dear [], [link](x)"),
    ({"id": "capital_words", "exactly": 1}, "I like NASA", "I A B"),
    ({"id": "questions", "exactly": 1}, "Why? So.", "Why."),
    ({"id": "keyword", "word": "cat", "exactly": 2}, "Cat and cat, concat", "cat concat"),
    ({"id": "letter", "letter": "z", "at_least": 3}, "Zzz", "zz"),
    ({"id": "contains", "words": ["red", "dark blue"]}, "Red, and dark blue", "reddish and blue"),
    ({"id": "avoids", "words": ["bad"]}, "a badge", "b\u200bad"),
    ({"id": "starts_with", "text": "Well,"}, "Well, yes", "well, yes"),
    ({"id": "ends_with", "text": "The end."}, "It is so. The end. ", "The end. Or not."),
    ({"id": "lowercase"}, "all small 1", "All small"),
    ({"id": "uppercase"}, "ALL 1!", "ALl"),
    ({"id": "no_commas"}, "one; two", "one， two"),
    ({"id": "quoted"}, '"in all"', '"in" all "of"'),
    ({"id": "title"}, "<<A title>>\ntext", "text <<A title>>"),
    ({"id": "postscript"}, "Dear.\n\nP.S. And more", "Dear.\n\nP.S."),
    ({"id": "json", "keys": ["a"]}, '{"a": 1}', '{"b": 1}'),
    ({"id": "sections", "names": ["A", "B"]}, "# A\nx\n## B\ny", "# A\nx\n# B\n"),
    ({"id": "one_of", "choices": ["Yes.", "No."]}, "Yes.", "Yes. No."),
    ({"id": "responses", "count": 2}, "one\n******\ntwo", "same\n******\nSame."),
    ({"id": "repeats_prompt", "prompt": "Say it."}, "Say it. It.", "Say it."),
    ({"id": "paragraph_starts", "number": 2, "of": 2, "word": "then"}, "A.\n\nThen b.", "Then.\n\nA."),
    ({"id": "alphabetical"}, "- ant\n- bee", "- bee\n- ant"),
    ({"id": "acrostic", "word": "sun"}, "Shine\nUpon\nNight", "s\nu\nn"),
    ({"id": "word_length", "at_most": 4}, "four and less", "fives here"),
    ({"id": "script", "name": "cyrillic"}, "Привет, мир", "Privet, мир"),
]

#: Each follows no instruction, whatever it says: (instruction, text).
HACKS = [
    ({"id": "words", "exactly": 50}, "I used exactly 50 words."),
    ({"id": "words", "exactly": 3}, "one\u200btwo three"),
    ({"id": "words", "at_least": 10}, "- - - - - - - - - - - - word"),
    ({"id": "avoids", "words": ["cheap"]}, "It is che\u00adap."),
    ({"id": "contains", "words": ["sun"]}, "sunday"),
    ({"id": "paragraphs", "exactly": 3}, "Text.\n\n\u200b\n\n\u200b"),
    ({"id": "bullets", "exactly": 3}, "a - b - c - d"),
    ({"id": "json", "keys": ["a"]}, 'Sure! {"a": 1}'),
    ({"id": "json"}, '{"a": NaN}'),
    ({"id": "no_commas"}, "No commas here、 really"),
    ({"id": "lowercase"}, "THIS IS LOWERCASE"),
    ({"id": "one_of", "choices": ["yes", "no"]}, "yes no"),
    ({"id": "responses", "count": 2}, "a\n******\n"),
    ({"id": "avoids", "words": ["x"]}, ""),
    ({"id": "no_commas"}, "..."),
    ({"id": "lowercase"}, "<think>nothing follows"),
]

#: (text, whether what it says of itself is so)
CLAIMS = [
    ("Cats are nice. I used exactly 50 words.", False),
    ("This response has three paragraphs.", False),
    ("Some text here.\n\n(Word count: 50)", False),
    ("[50 words] Cats sleep.", False),
    ("I wrote this text in all lowercase.", False),
    ("I avoided all commas, as you asked.", False),
    ("Here is it. My answer is valid JSON.", False),
    ("My answer contains at least 100 words.", False),
    ("I kept it under 5 words, as requested, and no more.", False),
    ("This essay is 200 words long.", False),
    ("The summary has exactly two sentences. But it goes. On. And on.", False),
    ("One two three. (3 words)", True),
    ("First. Second. This response has three sentences.", True),
    ("One two three four five. I used exactly five words.", True),
    ("the text is in all lowercase", True),
]  # fmt: skip

NO_CLAIMS = [
    "She has 50 words for snow.",
    "The form has three lines.",
    "A haiku is 3 lines long.",
    "JSON is valid.",
]


def test_every_instruction_is_in_the_table():
    assert {spec["id"] for spec, _, _ in TABLE} == set(CHECKERS)
    assert len(CHECKERS) >= 25


@pytest.mark.parametrize(("spec", "followed", "broken"), TABLE, ids=[spec["id"] for spec, _, _ in TABLE])
def test_instructions(spec, followed, broken):
    judge = InstructionJudge()
    assert judged(judge, followed, instructions=[spec]).value == 1
    assert judged(judge, broken, instructions=[spec]).value == 0


@pytest.mark.parametrize(("spec", "text"), HACKS)
def test_hacks(spec, text):
    assert judged(InstructionJudge(share=True), text, instructions=[spec]).value == 0


@pytest.mark.parametrize(("text", "so"), CLAIMS)
def test_claims_are_looked_at(text, so):
    found = claims(text)
    assert found
    assert all(claim.problem == "" for claim in found) is so
    if so:
        return
    verdict = judged(InstructionJudge(), text, instructions=[{"id": "words", "at_least": 1}])
    assert verdict.value == 0
    assert verdict.components["claims"] == 0
    span = next(item.span for item in verdict.evidence if item.component == "claims")
    assert text[slice(*span)].strip()


@pytest.mark.parametrize("text", NO_CLAIMS)
def test_what_is_said_of_other_things_is_no_claim(text):
    assert not claims(text)


def test_composed_instructions_are_components():
    specs = [
        {"id": "lowercase"},
        {"id": "words", "exactly": 2},
        {"id": "no_commas"},
        {"id": "bullets", "at_least": 1},
    ]
    assert judged(InstructionJudge(), "two words", instructions=specs).value == 0
    verdict = judged(InstructionJudge(share=True), "two words", instructions=specs)
    assert verdict.value == 0.75
    assert verdict.components == {"1_lowercase": 1, "2_words": 1, "3_no_commas": 1, "4_bullets": 0}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"id": "wrods"}, "none of: words"),
        ({"id": "words"}, "needs exactly"),
        ({"id": "words", "at_least": 3, "at_most": 2}, "above at_most"),
        ({"id": "words", "exactly": -1}, "negative"),
        ({"id": "words", "exactly": 3, "min": 2}, "min"),
        ({"id": "contains"}, "words"),
        ("words", "none of"),
    ],
)
def test_instructions_that_are_none(spec, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        instruction(spec)
    assert "\n" not in str(caught.value)
    assert not judged(InstructionJudge(), "text", instructions=[spec]).ok


def test_words_and_sentences():
    assert words("It's 3.5 km — well-known, e.g. here") == ["It's", "3.5", "km", "well-known", "e.g", "here"]
    text = 'He said "Go." Then he left!\nNew line? (Yes.) 3 more.'
    assert [text[a:b] for a, b in sentences(text)] == [
        'He said "Go."',
        "Then he left!",
        "New line?",
        "(Yes.)",
        "3 more.",
    ]
