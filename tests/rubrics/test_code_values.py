"""Plain values: there and back unchanged, hostile text refused, comparison strict."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rubrics.code.values import UnplainError, dumps, loads, same

hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
plain = st.recursive(
    hashable | st.just(math.nan) | st.sets(hashable, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(hashable, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_there_and_back(value: Any) -> None:
    back = loads(dumps(value))
    assert repr(back) == repr(value) or same(value, back)
    assert type(back) is type(value)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.text(), i))
)
def test_any_json_becomes_a_plain_value_or_is_refused(spelled: Any) -> None:
    import json

    try:
        value = loads(json.dumps(spelled))
    except UnplainError:
        return
    assert loads(dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "nonsense",
            "1.5",
            "NaN",
            "Infinity",
            '{"f": 1}',
            '{"f": "spam"}',
            '{"x": 1}',
            '{"r": 0, "type": "A"}',
        ),
        *(
            '{"i": 5}',
            '{"t": 5}',
            '{"d": [[1]]}',
            '{"d": [[[1], 2]]}',
            '{"s": [[1]]}',
            '{"b": "0"}',
            '{"c": ["1"]}',
        ),
        *("[" * 100_000, "[" * 200 + "]" * 200, "1" * 10_000, '{"f": "nan", "i": "1"}', b"\xff"),
    ],
)
def test_what_spells_no_value_is_refused(text: str | bytes) -> None:
    with pytest.raises(UnplainError):
        loads(text)


class Liar(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize(
    "value", [Liar(3), [Liar(3)], {"a": Liar(3)}, object(), len, int, iter([]), NotImplemented]
)
def test_objects_do_not_pass(value: Any) -> None:
    with pytest.raises(UnplainError):
        dumps(value)


def test_dicts_and_lists_of_the_standard_library_pass_as_what_they_equal() -> None:
    assert loads(dumps(collections.Counter("aab"))) == {"a": 2, "b": 1}
    assert loads(dumps(collections.deque([1, 2]))) == [1, 2]


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        *(
            (1, 1.0),
            (1, True),
            (0, False),
            (1.0, 1),
            ("1", 1),
            (None, 0),
            ([1], (1,)),
            ((1,), [1]),
            ({1}, [1]),
        ),
        *(
            ({1}, frozenset({1})),
            ({1: 2}, {True: 2}),
            ({1}, {True}),
            ([1, 2], [1]),
            ({"a": 1}, {"a": 1, "b": 2}),
        ),
        *((1.0, math.nan), (math.nan, 1.0), (1.0, math.inf), (math.inf, -math.inf), (0.1 + 0.2, 0.3)),
    ],
)
def test_not_the_same(expected: Any, got: Any) -> None:
    assert not same(expected, got)


@pytest.mark.parametrize(
    ("expected", "got", "result"),
    [
        *((1.0, 1, True), (1, 1.0, True), (1.0, 1.0005, True), (1.0, 1.002, False), (1e9, 1e9 + 1e5, True)),
        *(
            (1.0, math.nan, False),
            (math.nan, math.nan, True),
            (1.0, math.inf, False),
            (math.inf, math.inf, True),
        ),
        *((math.inf, 1e308, False), (True, 1, False), (10**400, 10**400, True), (10**400, 1.0, False)),
        *(([1.0, "a"], [1, "a"], True), ({"x": 1.0}, {"x": 1.0001}, True)),
    ],
)
def test_a_tolerance_is_for_finite_numbers(expected: Any, got: Any, result: bool) -> None:
    assert same(expected, got, tolerance=1e-3) is result
