"""Format, repetition and tool calls: right, wrong, and what wants to be taken for right."""

from __future__ import annotations

import asyncio

import pytest

from k2rl.types import ToolCall
from rubrics.base import judge_safely
from rubrics.verifiers.form import FormatJudge, RepetitionJudge
from rubrics.verifiers.tools import ToolCallJudge
from tests.rubrics.judging import episode, judged

PROSE = (
    "The committee met on Tuesday to look at the plans for the harbour. Two of its members had been there in "
    "spring, when ice still lay on the northern pier, and spoke against a new crane. Others asked what ships would "
    "do without one. Nobody had an answer; the chair proposed to hear the pilots first, and all agreed."
)


@pytest.mark.parametrize(
    ("turn", "value"),
    [
        ("<think>a b</think><answer>c</answer>", 1),
        ("\n<think>a\nb</think>\n\n<answer>c</answer>\n", 1),
        ("<answer>c</answer>", 0),
        ("<think>a</think>", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a</think> so <answer>c</answer>", 0),
        ("<think>a</think><answer>c</answer> done", 0),
        ("<think></think><answer>c</answer>", 0),
        ("<think> . </think><answer>c</answer>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a<answer>c</answer></think>", 0),
        ("<THINK>a</THINK><answer>c</answer>", 0),
        ("<think>a</think><answer>c", 0),
        ("", 0),
    ],
)
def test_format(turn, value):
    assert judged(FormatJudge(), turn).value == value


@pytest.mark.parametrize("text", [PROSE, "Paris.", "No. No, never!", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"])
def test_what_does_not_repeat_itself(text):
    assert judged(RepetitionJudge(), text).value == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<think>on and on",
        "so it is " * 100,
        "ha" * 300,
        "a" * 2000,
        PROSE * 4,
        "\n".join(f"It is true that it is true that it is true {i}" for i in range(60)),
        "the same line\n" * 50,
        "0123456789" * 100,
        "好" * 500,
        "wait, no. " * 80,
        (PROSE[:100] + " ") * 12,
    ],
)
def test_what_does(text):
    assert judged(RepetitionJudge(), text).value <= 0.05


class Shelf:
    """A backend: boxes with numbers of things in them."""

    def __init__(self, initial):
        self.boxes = dict(initial)

    def apply(self, name, arguments):
        if name == "move":
            source, to, count = arguments["source"], arguments["to"], arguments["count"]
            if self.boxes.get(source, 0) < count:
                raise ValueError("not so many there")
            self.boxes[source] -= count
            self.boxes[to] = self.boxes.get(to, 0) + count

    def state(self):
        return self.boxes


BOX = {"type": "string", "enum": ["a", "b", "c"]}
MOVE = {
    "type": "object",
    "properties": {"source": BOX, "to": BOX, "count": {"type": "integer", "minimum": 1}},
    "required": ["source", "to", "count"],
    "additionalProperties": False,
}
TOOLS = {"move": MOVE, "look": {"type": "object", "maxProperties": 0}, "burn": {"type": "object"}}


def move(source, to, count):
    return ("move", {"source": source, "to": to, "count": count})


def value(made_calls, **spec):
    made = tuple(ToolCall(f"functions.{name}:{i}", name, args) for i, (name, args) in enumerate(made_calls))
    judge = ToolCallJudge(backend=f"{__name__}:Shelf", ids=True)
    given = {"tools": TOOLS, **spec}
    return asyncio.run(judge_safely(judge, episode("done", calls=made, tool_spec=given), 10))


WANTED = [{"name": "look"}, {"name": "move", "arguments": {"source": "a", "to": "b"}}]
STATE = {"initial": {"a": 3}, "final": {"a": 1, "b": 2}, "order": "subset"}


@pytest.mark.parametrize(
    ("calls", "spec"),
    [
        ([("look", {}), move("a", "b", 2)], {"calls": WANTED}),
        ([move("a", "b", 1), ("look", {})], {"calls": WANTED, "order": "any_order"}),
        ([("look", {}), ("look", {}), move("a", "b", 2)], {"calls": WANTED, "order": "in_order"}),
        ([move("b", "c", 1), move("a", "b", 9), ("look", {})], {"calls": WANTED, "order": "subset"}),
        ([move("a", "b", 2)], STATE),
        ([move("a", "b", 1), move("a", "b", 1)], STATE),
        ([move("a", "b", 9), move("a", "b", 2)], STATE),
        ([], {}),
    ],
)
def test_right_calls(calls, spec):
    verdict = value(calls, **spec)
    assert verdict.value == 1, verdict


@pytest.mark.parametrize(
    ("calls", "spec"),
    [
        ([], {"calls": WANTED}),
        ([move("a", "b", 2), ("look", {})], {"calls": WANTED}),
        ([("look", {}), ("look", {}), move("a", "b", 2)], {"calls": WANTED}),
        ([("look", {}), move("a", "c", 2)], {"calls": WANTED}),
        ([("look", {}), move("a", "b", "2")], {"calls": WANTED}),
        ([("look", {}), move("a", "b", True)], {"calls": WANTED}),
        ([("look", {}), move("a", "b", 0)], {"calls": WANTED}),
        ([("look", {"why": "x"}), move("a", "b", 1)], {"calls": WANTED}),
        ([("peek", {}), move("a", "b", 1)], {"calls": WANTED}),
        ([move("a", "b", 1)], {"calls": [WANTED[1], WANTED[1]], "order": "subset"}),
        ([("burn", {}), move("a", "b", 2)], {**STATE, "forbidden": ["burn"]}),
        ([("look", {})] * 9 + [move("a", "b", 2)], {**STATE, "at_most": 5}),
        ([], STATE),
        ([move("a", "b", 3)], STATE),
        ([move("a", "b", 2), move("a", "c", 1)], STATE),
        ([move("a", "b", 9)], STATE),
    ],
)
def test_wrong_calls_and_hacks(calls, spec):
    assert value(calls, **spec).value == 0


def test_calls_written_as_text_are_none_and_ids_are_looked_at():
    spec = {"tools": TOOLS, "calls": [{"name": "look"}]}
    judge = ToolCallJudge(ids=True)
    assert judged(judge, '{"name": "look", "arguments": {}}', tool_spec=spec).value == 0
    wrong = (ToolCall("functions.look:1", "look", {}),)
    verdict = asyncio.run(judge_safely(judge, episode("", calls=wrong, tool_spec=spec), 10))
    assert verdict.components == {"schema": 0, "order": 1, "state": 1}


def test_specs_that_make_no_sense_are_failures():
    assert "unknown field" in value([], order="exact", kalls=[]).failure
    assert "Invalid enum value" in value([], order="sorted").failure
    with pytest.raises(ValueError, match="write it as module:Class"):
        ToolCallJudge(backend="Shelf")
    spec = {"tools": TOOLS, "final": {}}
    assert "needs a backend" in judged(ToolCallJudge(), "", tool_spec=spec).failure
