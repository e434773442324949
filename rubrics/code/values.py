"""Plain values across a process border: what code that nobody trusts returns, as typed JSON.

Its text is also run inside sandboxes, so it needs nothing but the standard library. Never pickle: what the
other side sends is data, and becomes nothing but exact built-in types here, whatever it sent.

    None, bool, str                 themselves
    int                             itself, or {"i": "0x1f"} beyond 2**53
    float                           {"f": "0x1.8p+1"}, {"f": "nan"}, {"f": "inf"}, {"f": "-inf"}
    complex, bytes                  {"c": [real, imaginary]}, {"b": "00ff"}
    list                            itself
    tuple, set, frozenset, dict     {"t": […]}, {"s": […]}, {"z": […]}, {"d": [[key, value], …]}
    anything else                   {"r": number, "type": "Stack"}: a handle on an object that stayed there
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable
from typing import Any

MOST_DEPTH = 64
MOST_NODES = 2_000_000
EXACT = 2**53

Keep = Callable[[Any], Any]


class UnplainError(Exception):
    """A value that is not plain, or text that does not spell one."""


def dumps(value: Any, keep: Keep | None = None) -> str:
    """A value as text; `keep` gives what stands for an object that is not plain.

    Raises:
        UnplainError: without `keep`, for an object that is not plain; for values too deep or too large.
    """
    return json.dumps(_Encoder(keep).encode(value, 0), separators=(",", ":"))


def loads(text: str | bytes, find: Keep | None = None) -> Any:
    """The value of a text; `find` gives the object of a handle.

    Raises:
        UnplainError: the text spells no plain value; without `find`, a handle.
    """
    try:
        return decode(json.loads(text), find)
    except (ValueError, RecursionError) as error:
        raise UnplainError(f"not a plain value: {type(error).__name__}") from error


def encode(value: Any, keep: Keep | None = None) -> Any:
    """A value as JSON builtins; see `dumps`."""
    return _Encoder(keep).encode(value, 0)


class _Encoder:
    def __init__(self, keep: Keep | None) -> None:
        self.keep = keep
        self.nodes = 0

    def encode(self, value: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MOST_DEPTH or self.nodes > MOST_NODES:
            raise UnplainError("a value too deep or too large")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -EXACT <= value <= EXACT else {"i": hex(value)}
        if kind is float:
            return {"f": _float_text(value)}
        if kind is complex:
            return {"c": [_float_text(value.real), _float_text(value.imag)]}
        if kind is bytes:
            return {"b": value.hex()}
        if kind is list:
            return [self.encode(item, depth + 1) for item in value]
        if kind is collections.deque:
            return [self.encode(item, depth + 1) for item in value]
        if kind is tuple:
            return {"t": [self.encode(item, depth + 1) for item in value]}
        if kind in (set, frozenset):
            # In one order whatever the process's hash seed, so that equal sets have equal texts.
            items = [self.encode(item, depth + 1) for item in value]
            return {"s" if kind is set else "z": sorted(items, key=json.dumps)}
        return self._other(value, kind, depth)

    def _other(self, value: Any, kind: type, depth: int) -> Any:
        # Subclasses of the standard library that equal the dict they are.
        if kind in (dict, collections.Counter, collections.OrderedDict, collections.defaultdict):
            pairs = dict.items(value)
            return {"d": [[self.encode(key, depth + 1), self.encode(item, depth + 1)] for key, item in pairs]}
        if self.keep is None:
            raise UnplainError(f"a value of type {kind.__name__}")
        return self.keep(value)


def decode(spelled: Any, find: Keep | None = None, depth: int = 0) -> Any:
    """The value of JSON builtins; see `loads`."""
    if depth > 2 * MOST_DEPTH:
        raise UnplainError("a value too deep")
    if spelled is None or type(spelled) in (bool, str, int):
        return spelled
    if type(spelled) is list:
        return [decode(item, find, depth + 1) for item in spelled]
    if type(spelled) is not dict:
        raise UnplainError(f"a {type(spelled).__name__} that is not spelled out")
    if "r" in spelled:
        if find is None or type(spelled["r"]) is not int:
            raise UnplainError(f"an object of type {spelled.get('type')!s:.60}")
        return find(spelled)
    if len(spelled) != 1:
        raise UnplainError("not a tagged value")
    ((tag, content),) = spelled.items()
    try:
        return _TAGS[tag](content, find, depth)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise UnplainError(f"not a plain value: {type(error).__name__}") from error


def same(expected: Any, got: Any, tolerance: float | None = None) -> bool:
    """Whether two plain values are the same, in type as in value: `1`, `1.0` and `True` are three.

    With a tolerance, absolute or relative, a number may be an int or a float. NaN is the same as NaN
    alone, an infinity as itself alone. Lists and tuples keep their order, dicts do not.
    """
    if tolerance is not None and _is_number(expected) and _is_number(got):
        return _close(expected, got, tolerance)
    if type(expected) is not type(got):
        return False
    if type(expected) is float:
        return bool(expected == got) or (math.isnan(expected) and math.isnan(got))
    if isinstance(expected, list | tuple):
        return len(expected) == len(got) and all(
            same(one, other, tolerance) for one, other in zip(expected, got, strict=True)
        )
    if isinstance(expected, dict):
        by_type = {(type(key), key): item for key, item in got.items()}
        return len(expected) == len(got) and all(
            (type(key), key) in by_type and same(item, by_type[type(key), key], tolerance)
            for key, item in expected.items()
        )
    if isinstance(expected, set | frozenset):
        return {(type(item), item) for item in expected} == {(type(item), item) for item in got}
    return bool(expected == got)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _close(expected: float, got: float, tolerance: float) -> bool:
    try:
        one, other = float(expected), float(got)
    except OverflowError:
        return expected == got
    if not (math.isfinite(one) and math.isfinite(other)):
        return one == other or (math.isnan(one) and math.isnan(other))
    return abs(one - other) <= tolerance * max(1.0, abs(one))


def _float_text(value: float) -> str:
    return "nan" if value != value else float.hex(value)


def _float(text: Any) -> float:
    return float.fromhex(text) if type(text) is str else _refuse()


def _refuse() -> Any:
    raise UnplainError("not a plain value")


def _items(content: Any, find: Keep | None, depth: int) -> list[Any]:
    return [decode(item, find, depth + 1) for item in content] if type(content) is list else _refuse()


_TAGS: dict[str, Callable[[Any, Keep | None, int], Any]] = {
    "i": lambda content, find, depth: int(content, 16),
    "f": lambda content, find, depth: _float(content),
    "c": lambda content, find, depth: complex(_float(content[0]), _float(content[1])),
    "b": lambda content, find, depth: bytes.fromhex(content),
    "t": lambda content, find, depth: tuple(_items(content, find, depth)),
    "s": lambda content, find, depth: set(_items(content, find, depth)),
    "z": lambda content, find, depth: frozenset(_items(content, find, depth)),
    "d": lambda content, find, depth: {
        decode(key, find, depth + 1): decode(item, find, depth + 1) for key, item in content
    },
}
