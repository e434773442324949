import contextlib
import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxes.arithmetic import (
    ExpressionError,
    ExpressionSyntaxError,
    ExpressionTooLargeError,
    ExpressionZeroDivisionError,
    Limits,
    evaluate,
    format_number,
)

WIDE = Limits(max_length=100_000, max_depth=200, max_digits=100_000)
NUMBER = re.compile(r"\d+\.?\d*|\.\d+")


def python_value(expression: str) -> Fraction:
    """What Python makes of an expression whose literals are exact fractions."""
    exact = NUMBER.sub(lambda number: f"F('{number[0]}')", expression.strip())
    return eval(exact, {"__builtins__": {}, "F": Fraction})


numbers = st.one_of(
    st.integers(0, 999).map(str),
    st.decimals(0, 99, places=2).map(str),
)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", " * ", "/", " // ", "%"]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        st.tuples(inner, st.integers(-3, 4)).map(lambda pair: f"({pair[0]})**{pair[1]}"),
    ),
    max_leaves=8,
)


@given(expressions)
@settings(derandomize=True, deadline=None, max_examples=200)
@example("-2**2")
@example("2**3**2")
@example("2**-1")
@example("-7 // 2")
@example("-7 % 3")
@example("7.5 // 2")
@example("0.1 + 0.2")
@example("1/0")
@example("0**-1")
def test_expressions_have_pythons_exact_value(expression):
    try:
        expected = python_value(expression)
    except ZeroDivisionError:
        with pytest.raises(ExpressionZeroDivisionError, match=r"^division by zero$"):
            evaluate(expression, WIDE)
        return
    value = evaluate(expression, WIDE)
    assert value == expected
    assert isinstance(value, int) == (expected.denominator == 1)


@given(st.text(alphabet="0123456789.+-*/%() ", max_size=40))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_whatever_evaluates_has_pythons_value(text):
    try:
        value = evaluate(text)
    except ExpressionError:
        return
    assert value == python_value(text)
    assert max(abs(value.numerator), value.denominator) < 10**50


@given(st.text(max_size=300))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_any_text_gives_a_number_or_a_typed_error(text):
    try:
        evaluate(text)
    except ExpressionError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 100
    assert "\n" not in message


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("9**9**9", ExpressionTooLargeError),
        ("9**9**9**9", ExpressionTooLargeError),
        ("2**-99999999999", ExpressionTooLargeError),
        ("0.5**99999999999", ExpressionTooLargeError),
        ("(1/3)**99999999999", ExpressionTooLargeError),
        ("9" * 51, ExpressionTooLargeError),
        ("0." + "0" * 60 + "1", ExpressionTooLargeError),
        ("1" * 10**8, ExpressionTooLargeError),
        ("(" * 10**7, ExpressionTooLargeError),
        ("(" * 99 + "1" + ")" * 99, ExpressionTooLargeError),
        ("-" * 199 + "1", ExpressionTooLargeError),
        ("1" + "+1" * 99, ExpressionTooLargeError),
        ("1" + "**1" * 66, ExpressionTooLargeError),
        ("__import__('os')", ExpressionSyntaxError),
        ("x", ExpressionSyntaxError),
        ("(1).real", ExpressionSyntaxError),
        ("[1][0]", ExpressionSyntaxError),
        ("1 if 1 else 2", ExpressionSyntaxError),
        ("lambda: 1", ExpressionSyntaxError),
        ("1e9", ExpressionSyntaxError),
        ("0x10", ExpressionSyntaxError),
        ("1_000", ExpressionSyntaxError),
        ("1,000", ExpressionSyntaxError),
        ("1j", ExpressionSyntaxError),
        ("'a' * 9", ExpressionSyntaxError),
        ("True", ExpressionSyntaxError),
        ("1 < 2", ExpressionSyntaxError),
        ("~1", ExpressionSyntaxError),
        ("1 # 2", ExpressionSyntaxError),
        ("1\n+2", ExpressionSyntaxError),
        ("1\0", ExpressionSyntaxError),
        ("٤ + 1", ExpressionSyntaxError),
        ("", ExpressionSyntaxError),
        ("  ", ExpressionSyntaxError),
        ("()", ExpressionSyntaxError),
        ("...", ExpressionSyntaxError),
        ("1(2)", ExpressionSyntaxError),
        ("(*1)", ExpressionSyntaxError),
        ("007", ExpressionSyntaxError),
        ("1 +", ExpressionSyntaxError),
        ("1 2", ExpressionSyntaxError),
        ("(1", ExpressionSyntaxError),
        ("1)", ExpressionSyntaxError),
        ("+1", ExpressionSyntaxError),
        ("4 ** 0.5", ExpressionSyntaxError),
        ("1 % 0", ExpressionZeroDivisionError),
        ("1 // (1 - 1)", ExpressionZeroDivisionError),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_hostile_and_malformed_input_is_refused_at_once(expression, error):
    started = time.process_time()
    with pytest.raises(error):
        evaluate(expression)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    "unit", ["(", "((", "(-", "(1+", "-(", "1**", "(1)(", "*", "**", "(*", "1//-", ".", "%(", ")"]
)
@pytest.mark.parametrize("tail", ["", "1", "1)", ")" * 60])
def test_no_pattern_within_the_limits_keeps_the_parser_busy(unit, tail):
    started = time.process_time()
    with contextlib.suppress(ExpressionError):
        evaluate((unit * 200)[: 200 - len(tail)] + tail, Limits(max_depth=200))
    assert time.process_time() - started < 0.5


def test_numbers_at_the_limit():
    assert evaluate("9" * 50) == 10**50 - 1
    assert evaluate("1 ** 99999999999") == 1
    assert evaluate("(0 - 1) ** 99999999999") == -1
    assert evaluate("10 ** 49") == 10**49
    with pytest.raises(ExpressionTooLargeError, match="more than 50 digits"):
        evaluate("10 ** 50")
    with pytest.raises(ExpressionTooLargeError, match="201 characters, at most 200"):
        evaluate(" " * 200 + "1")
    assert evaluate("1" + "+1" * 63) == 64


@pytest.mark.parametrize(
    ("expression", "text"),
    [("12 + 30", "42"), ("7 / 2", "3.5"), ("6 / 2", "3"), ("1 / 3", "0.3333333333"), ("-1 / 4", "-0.25")],
)
def test_numbers_as_text(expression, text):
    assert format_number(evaluate(expression)) == text


@given(st.integers(-(10**50) + 1, 10**50 - 1))
@settings(derandomize=True, deadline=None)
def test_integers_survive_a_round_trip(number):
    text = format_number(evaluate(f"0 {'-' if number < 0 else '+'} {abs(number)}"))
    assert int(text) == number
