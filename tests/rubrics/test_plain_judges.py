"""Exact, numeric, pattern and schema judges: accepted, rejected, and answers that want to be taken for right."""

from __future__ import annotations

import asyncio

import pytest

from rubrics.verifiers.plain import ExactJudge, JsonSchemaJudge, NumericJudge, RegexJudge, number
from tests.rubrics.judging import episode, judged

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("truth", "turn", "value"),
    [
        ("Paris", "Answer: paris.", 1),
        ("Paris", "<answer> Paris </answer>", 1),
        ("Paris", "**Answer:** Paris", 1),
        (["Paris", "the City of Light"], "Answer: The city of light!", 1),
        ("7", "\\boxed{7}", 1),
        ("Paris", "Answer: Rome", 0),
        # What wants to be taken for right:
        ("Paris", "Answer: Paris, Rome or London", 0),
        ("Paris", "Answer: not Paris", 0),
        ("Paris", "Paris", 0),
        ("Paris", "Answer: Par\u200bis Rome", 0),
        ("Paris", "<answer>Paris</answer><answer>Rome</answer>", 0),
        ("Paris", "Answer: Paris\nAnswer: Rome", 0),
        ("Paris", "<think>Answer: Paris", 0),
        ("Paris", "Answer: {the correct answer}", 0),
        ("Paris", "Answer: .", 0),
        ("Paris", "Answer: P a r i s", 0),
        ("Paris", "Answer: *", 0),
        ("Paris", "", 0),
    ],
)
def test_exact(truth, turn, value):
    assert judged(ExactJudge(), turn, answer=truth).value == value


def test_exact_and_strict():
    assert judged(ExactJudge(place="whole", strict=True), "Paris", answer="Paris").value == 1
    assert judged(ExactJudge(place="whole", strict=True), "paris", answer="Paris").value == 0
    assert "no text" in judged(ExactJudge(), "Answer: x", answer={"a": 1}).failure


@pytest.mark.parametrize(
    ("truth", "answer", "value"),
    [
        ("3.14", "3.14", 1),
        (100, "100", 1),
        ("0.5", "1/2", 1),
        (1000, "1,000", 1),
        (-3, "−3", 1),
        ("1e3", "1000", 1),
        (100, "100.5", 1),
        (100, "$100$", 1),
        (100, "101.1", 0),
        # What wants to be taken for right:
        (100, "nan", 0),
        (100, "inf", 0),
        (100, "-inf", 0),
        (100, "100 or 200", 0),
        (100, "1_00", 0),
        (100, "100100", 0),
        (100, "0x64", 0),
        (100, "1,00", 0),
        (100, "100/0", 0),
        (100, "99..101", 0),
        (100, "True", 0),
        (100, "1" * 5000, 0),
        (100, "one hundred", 0),
        (100, "~100", 0),
    ],
)
def test_numeric(truth, answer, value):
    judge = NumericJudge(place="whole", relative=0.01)
    assert judged(judge, answer, answer=truth).value == value


def test_numbers_are_exact():
    assert judged(NumericJudge(place="whole"), "0.30000000000000004", answer="0.3").value == 0
    assert judged(NumericJudge(place="whole", unit="km"), "12 km", answer=12).value == 1
    assert "not a number" in judged(NumericJudge(place="whole"), "12", answer="many").failure
    assert number("1e999") is not None
    assert number("-") is None


@pytest.fixture(scope="module")
def regex():
    judge = RegexJudge(place="whole", deadline_s=20)
    yield judge
    asyncio.run(judge.close())


@pytest.mark.parametrize(
    ("pattern", "answer", "value"),
    [
        (r"\d{3}-\d{4}", "555-1234", 1),
        (r"(?i)yes|no", "YES", 1),
        (r"\d{3}-\d{4}", "555-12345", 0),
        # What wants to be taken for right:
        (r"\d{3}-\d{4}", "call 555-1234", 0),
        (r"\d{3}-\d{4}", "555-1234\n999-9999", 0),
        (r"\d{3}-\d{4}", r"\d{3}-\d{4}", 0),
        (r"\d{3}-\d{4}", ".*", 0),
        (r"yes|no", "yes no", 0),
        (r"yes|no", "yes|no", 0),
        (r"yes|no", "y es", 0),
        (r"[a-z]+", "abc1", 0),
        (r"[a-z]+", "abc\n", 1),  # spaces around an answer are none of it
        (r"[a-z]+", "abc\x00", 0),
        (r"[a-z]+", "ABC", 0),
        (r"\w+@\w+\.com", "a@b.com,c@d.com", 0),
    ],
)
def test_regex(regex, pattern, answer, value):
    assert judged(regex, answer, pattern=pattern).value == value


def test_a_pattern_that_takes_for_ever_is_killed_and_one_that_is_none_fails():
    judge = RegexJudge(place="whole", deadline_s=1)
    judged(RegexJudge(place="whole", deadline_s=20), "a", pattern="a")
    assert "not over within 1 s" in judged(judge, "a" * 60 + "!", pattern=r"(a+)+b").failure
    assert "pattern is none" in judged(judge, "a", pattern="(").failure


@pytest.fixture(scope="module")
def schema():
    judge = JsonSchemaJudge(deadline_s=20)
    yield judge
    asyncio.run(judge.close())


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        ('```json\n{"name": "Ada", "age": 36}\n```', 1),
        ('{"name": "Ada"}', 0),
        ('{"name": "Ada", "age": "36"}', 0),
        # What wants to be taken for right:
        ('{"name": "Ada", "age": NaN}', 0),
        ('{"name": "Ada", "age": -1, "age": 36}', 0),
        ('{"name": "Ada", "age": Infinity}', 0),
        ('Here it is: {"name": "Ada", "age": 36}', 0),
        ('{"name": "Ada", "age": 36} {"name": "B", "age": 1}', 0),
        ('{"name": "Ada", "age": 36, "score": 1}', 0),
        ('{"name": "Ada", "age": true}', 0),
        ("[" * 100_000, 0),
        ("{'name': 'Ada', 'age': 36}", 0),
        ('{"name": "Ada", "age": 36,}', 0),
        ('{"$ref": "#"}', 0),
        ("null", 0),
    ],
)
def test_json_schema(schema, answer, value):
    assert judged(schema, answer, schema=SCHEMA).value == value


def test_schemas_that_are_none_or_would_fetch_something_fail(schema):
    assert "schema is none" in judged(schema, "1", schema={"type": "nothing"}).failure
    assert "Unresolvable" in judged(schema, "1", schema={"$ref": "http://127.0.0.1:1/x.json"}).failure


@pytest.mark.parametrize(
    "judge",
    [ExactJudge(), NumericJudge(), RegexJudge(), JsonSchemaJudge()],
    ids=lambda judge: type(judge).__name__,
)
def test_a_task_that_says_nothing_is_a_failure(judge):
    assert "has no" in judged(judge, "Answer: 1").failure


def test_content_decides_what_is_cached():
    one, other = episode("Answer: 1", answer=1), episode("Answer: 1", answer=2)
    judge = NumericJudge()
    assert judge.content(one) != judge.content(other)
    assert judge.identity != NumericJudge(relative=0.1).identity
