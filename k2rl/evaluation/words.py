"""Words of a command line that are `key=value`, into the fields of a struct."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from k2rl.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


def read_words(words: Sequence[str], kind: type[T], command: str, open_keys: Sequence[str] = ()) -> T:
    """The options that words spell; `open_keys` take `key.name=value` into the dictionary field `key_values`.

    Raises:
        ConfigError: one line that names the word and what there is.
    """
    known = [name for name in kind.__struct_fields__ if not name.endswith("_values")]
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        base, dot, name = key.partition(".")
        if equals and dot and base in open_keys and name:
            values.setdefault(f"{base}_values", {})[name] = value
        elif equals and key in known:
            values[key] = value
        else:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}=?" if close else f"there are: {', '.join(known)}"
            raise ConfigError(f"{word}: no key of `k2rl {command}`; {hint}")
    try:
        return msgspec.convert(values, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"k2rl {command}: {error}") from error
