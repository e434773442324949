"""Evaluate arithmetic that nobody trusts, exactly and within fixed bounds.

The expression is screened for length, characters and nesting, parsed to a syntax tree, and only
whitelisted nodes are computed; nothing is ever passed to `eval`. Numbers are exact: integers stay
integers, decimals and quotients are fractions.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Number = int | Fraction


class ExpressionError(ValueError):
    """The expression has no value here; the message is one short line a model can read."""


class ExpressionSyntaxError(ExpressionError):
    """It is not an arithmetic expression: names, calls, unknown characters, missing parts."""


class ExpressionTooLargeError(ExpressionError):
    """It is too long or too deep, or a number in it or on the way grows too large."""


class ExpressionZeroDivisionError(ExpressionError):
    """It divides by zero."""


@dataclass(frozen=True)
class Limits:
    """What one expression may cost."""

    #: Characters of the expression.
    max_length: int = 200
    #: Depth of the syntax tree; a sum of n terms is n deep.
    max_depth: int = 64
    #: Decimal digits of every number: literals, intermediate values and the result.
    max_digits: int = 50


DEFAULT_LIMITS = Limits()

_CHARACTERS = frozenset("0123456789.+-*/%() ")
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: Fraction(left) / Fraction(right),
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(expression: str, limits: Limits = DEFAULT_LIMITS) -> Number:
    """The exact value of an expression of numbers, `+ - * / // % **`, unary minus and parentheses.

    Operators bind and round as Python's do. A whole result is an `int`, any other a `Fraction`.

    Raises:
        ExpressionSyntaxError: if it is anything but arithmetic, or an exponent is not whole.
        ExpressionTooLargeError: if the expression or one of its numbers exceeds `limits`.
        ExpressionZeroDivisionError: if it divides by zero.
    """
    source = _screen(expression, limits)
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise ExpressionSyntaxError("not a complete arithmetic expression") from error
    except (MemoryError, RecursionError) as error:  # how CPython's parser reports nesting beyond its stack
        raise ExpressionTooLargeError("expression too deeply nested") from error
    return _Evaluation(source, limits).value(tree.body, depth=1)


def format_number(value: Number) -> str:
    """A number as text: integers exactly, fractions as decimals of up to ten significant digits."""
    return str(value) if isinstance(value, int) else f"{float(value):.10g}"


def _screen(expression: str, limits: Limits) -> str:
    """Reject by cheap looks what the parser should not be bothered with."""
    if len(expression) > limits.max_length:
        raise ExpressionTooLargeError(
            f"expression too long ({len(expression)} characters, at most {limits.max_length})"
        )
    nesting = 0
    for character in expression:
        if character not in _CHARACTERS:
            raise ExpressionSyntaxError(f"unexpected character {character!r}")
        nesting += (character == "(") - (character == ")")
        if nesting > limits.max_depth:
            raise ExpressionTooLargeError("expression too deeply nested")
    source = expression.strip(" ")
    if not source:
        raise ExpressionSyntaxError("empty expression")
    return source


@dataclass(frozen=True)
class _Evaluation:
    source: str
    limits: Limits

    def value(self, node: ast.expr, depth: int) -> Number:
        if depth > self.limits.max_depth:
            raise ExpressionTooLargeError("expression too deeply nested")
        match node:
            case ast.Constant():
                return self.checked(self.literal(node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand, depth + 1)
            case ast.BinOp(left=left, op=op, right=right):
                operands = self.value(left, depth + 1), self.value(right, depth + 1)
                return self.checked(self.combine(op, *operands))
        raise ExpressionSyntaxError("only numbers, + - * / // % ** and parentheses are allowed")

    def literal(self, node: ast.Constant) -> Number:
        text = self.source[node.col_offset : node.end_col_offset]
        try:
            # From the text, not from node.value: a parsed decimal is a rounded float.
            return Fraction(text)
        except ValueError as error:  # the only other literal these characters can spell is `...`
            raise ExpressionSyntaxError(f"not a number: {text}") from error

    def combine(self, op: ast.operator, left: Number, right: Number) -> Number:
        try:
            if isinstance(op, ast.Pow):
                return self.power(left, right)
            if type(op) in _BINARY:
                return _BINARY[type(op)](left, right)
        except ZeroDivisionError as error:
            raise ExpressionZeroDivisionError("division by zero") from error
        raise ExpressionSyntaxError("only numbers, + - * / // % ** and parentheses are allowed")

    def power(self, base: Number, exponent: Number) -> Number:
        if not isinstance(exponent, int):
            raise ExpressionSyntaxError("the exponent must be a whole number")
        base = Fraction(base)
        bits = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
        # A power of a b-bit number has at least (b - 1) * exponent bits: refuse before computing it.
        if (bits - 1) * abs(exponent) > (10**self.limits.max_digits).bit_length():
            raise self.too_large()
        return base**exponent

    def checked(self, value: Number) -> Number:
        """The value in its simplest type, if it is small enough."""
        bound: int = 10**self.limits.max_digits
        if abs(value.numerator) >= bound or value.denominator >= bound:
            raise self.too_large()
        return value.numerator if value.denominator == 1 else value

    def too_large(self) -> ExpressionTooLargeError:
        return ExpressionTooLargeError(f"number too large (more than {self.limits.max_digits} digits)")
