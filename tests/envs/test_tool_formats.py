"""How model families write tool calls: read back what was written, and never raise."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.tools.formats import FORMATS, MARKERS, Call, Turn, format_of, introduced, parse, written
from envs.tools.formats.base import MAX_READ
from k2rl.types import Message, ToolCall, ToolSpec

SECTION = "<|tool_calls_section_begin|>"

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pieces = st.sampled_from(
    [*sorted(MARKERS), "<think>", "</think>", "{", '"', "a", " ", "\n", ";", "functions.f:0"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
    | st.lists(pieces, max_size=4).map("".join),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,11}", fullmatch=True)
arguments = st.dictionaries(text, values, max_size=3)


@st.composite
def calls(draw):
    drawn = draw(st.lists(st.tuples(names, arguments), max_size=4))
    return tuple(
        ToolCall(f"functions.{name}:{number}", name, given) for number, (name, given) in enumerate(drawn)
    )


def plain(content: str) -> bool:
    """Whether a text spells no call and no thought in any format."""
    return not any(mark in content for mark in (*MARKERS, "<think>")) and not content.startswith("{")


@given(content=text.map(str.strip).filter(plain), calls=calls(), name=st.sampled_from(sorted(FORMATS)))
def test_what_is_written_is_read_back(content, calls, name):
    turn = FORMATS[name].render(content, calls)
    for read in (FORMATS[name].parse(turn), parse(turn)):
        assert read.content == content
        assert [(call.name, call.arguments, call.problem) for call in read.calls] == [
            (call.name, call.arguments, "") for call in calls
        ]
        if name == "kimi":
            assert [call.id for call in read.calls] == [call.id for call in calls]
    if calls:
        assert format_of(turn) is FORMATS[name]


json_like = st.lists(
    pieces | st.sampled_from(['{"name":"f","arguments":{}}', '{"name":1}', "[1]", "NaN"]), max_size=12
)


@given(json_like.map("".join) | st.text(max_size=30))
def test_nothing_that_a_policy_writes_makes_a_parser_raise(written):
    for read in (parse, *(format.parse for format in FORMATS.values())):
        turn = read(written)
        assert isinstance(turn, Turn)
        for call in turn.calls:
            json.dumps(call.arguments, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ("<tool_call>{'a': 1}</tool_call>", "the call is no JSON: Expecting property name"),
        ("<tool_call>", "no JSON: Expecting value"),
        ('<tool_call>["f"]</tool_call>', "a call is one JSON object"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "the arguments are no JSON object"),
        ('<tool_call>{"name": "f"} and more</tool_call>', "something other than </tool_call>"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "half a surrogate pair"),
        (f"<tool_call>{'[' * 10**5}</tool_call>", "too deeply nested"),
        (f'<tool_call>{{"name": "f", "arguments": {{"a": {"9" * 5000}}}}}</tool_call>', "Exceeds the limit"),
        ('{"name": "f", "parameters": {"a": 1}', "no JSON"),
        ("<|python_tag|>print(1)", "the call is no JSON"),
        ("<|tool_calls_section_begin|><|tool_calls_section_end|>", "the section of tool calls has none"),
        ("<|tool_calls_section_begin|><|tool_call_begin|>f", "a call is functions.NAME:INDEX"),
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{1}"
            "<|tool_call_end|>",
            "the arguments are no JSON",
        ),
        (
            f"{SECTION}<|tool_call_begin|>a b<|tool_call_argument_begin|>{{}}<|tool_call_end|>",
            "'a b' is no id of a call",
        ),
    ],
)
def test_a_bad_call_says_what_is_wrong(turn, problem):
    (call,) = parse(turn).calls
    assert problem in call.problem
    assert len(call.problem) < 200


def test_forms_that_models_use():
    good = Call("f", {"a": "x\ny"})
    assert parse('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}').calls == (good,)
    assert parse('Now.\n<|python_tag|>{"name": "f", "parameters": {"a": "x\ny"}}') == Turn("Now.", (good,))
    assert parse('{"type": "function", "name": "f", "parameters": {"a": "x\\ny"}}').calls == (good,)
    bad, following = parse(
        '<tool_call>{oops <tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>'
    ).calls
    assert bad.problem
    assert following == good
    kimi = (
        f"Let me see.{SECTION}\n<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>"
        '{"a": 1}<|tool_call_end|>\n<|tool_call_begin|>g:4<|tool_call_argument_begin|>'
        "{}<|tool_calls_section_end|>"
    )
    assert parse(kimi) == Turn("Let me see.", (Call("f", {"a": 1}, "functions.f:3"), Call("g", {}, "g:4")))


def test_thoughts_call_nothing():
    call = '<tool_call>{"name": "f"}</tool_call>'
    assert parse(f"<think>I could {call}</think>Yes.") == Turn(f"<think>I could {call}</think>Yes.")
    assert parse(f"<think>Well.</think>{call}") == Turn("<think>Well.</think>", (Call("f"),))
    assert parse(f"<think>I could {call}").calls == ()


@pytest.mark.parametrize(
    "mark", [*sorted(MARKERS), '<tool_call>{"', '{"name": "f"}', "<|tool_call_begin|>f:0"]
)
def test_of_a_flood_of_calls_the_first_are_read(mark):
    for start in ("", SECTION):
        assert len(parse(start + mark * 10_000).calls) <= MAX_READ


def test_tools_are_introduced_where_the_template_does_not():
    tool = ToolSpec("add", "Add.", {"type": "object", "properties": {}})
    user = Message("user", "1 + 2?")
    opening = introduced([Message("system", "Be brief."), user], [tool])
    assert opening[0].content.startswith("Be brief.\n\nYou have these tools")
    assert introduced([user], [tool])[0].role == "system"
    assert introduced([user], []) == (user,)
    turn = Message("assistant", "", (ToolCall("functions.add:0", "add", {"a": 1}),))
    assert parse(written(turn)).calls == (Call("add", {"a": 1}),)
    assert written("3") == "3"
