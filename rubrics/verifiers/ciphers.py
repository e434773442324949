"""Classical ciphers, both ways."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_lowercase
from typing import Any

ALPHABET = ascii_lowercase


def encrypt(cipher: str, text: str, key: Any) -> str:
    """`text` in a cipher of `CIPHERS`.

    Raises:
        ValueError: there is no such cipher, or this is no key for it.
    """
    return _cipher(cipher)(text, key, 1)


def decrypt(cipher: str, text: str, key: Any) -> str:
    """What was encrypted; raises as `encrypt`."""
    return _cipher(cipher)(text, key, -1)


def _cipher(name: str) -> Callable[[str, Any, int], str]:
    if name not in CIPHERS:
        raise ValueError(f"cipher {name!r} is none of: {', '.join(CIPHERS)}")
    return CIPHERS[name]


def _shifted(letter: str, by: int) -> str:
    if letter.lower() not in ALPHABET:
        return letter
    moved = ALPHABET[(ALPHABET.index(letter.lower()) + by) % 26]
    return moved.upper() if letter.isupper() else moved


def _caesar(text: str, key: Any, sign: int) -> str:
    if type(key) is not int:
        raise ValueError(f"the key of a Caesar cipher is a number, not {key!r}")
    return "".join(_shifted(letter, sign * key) for letter in text)


def _vigenere(text: str, key: Any, sign: int) -> str:
    if not (isinstance(key, str) and key.isascii() and key.isalpha()):
        raise ValueError(f"the key of a Vigenère cipher is a word, not {key!r}")
    shifts, made, at = [ALPHABET.index(letter) for letter in key.lower()], [], 0
    for letter in text:
        made.append(_shifted(letter, sign * shifts[at % len(shifts)]))
        at += letter.lower() in ALPHABET
    return "".join(made)


def _substitution(text: str, key: Any, sign: int) -> str:
    if not (isinstance(key, str) and sorted(key.lower()) == list(ALPHABET)):
        raise ValueError("the key of a substitution is the alphabet in another order")
    pair = (ALPHABET, key.lower()) if sign > 0 else (key.lower(), ALPHABET)
    table = str.maketrans(pair[0] + pair[0].upper(), pair[1] + pair[1].upper())
    return text.translate(table)


def _atbash(text: str, key: Any, sign: int) -> str:
    return _substitution(text, ALPHABET[::-1], sign)


def _rail_fence(text: str, key: Any, sign: int) -> str:
    if type(key) is not int or key < 2:
        raise ValueError(f"the key of a rail fence is a number above 1, not {key!r}")
    cycle = 2 * (key - 1)
    order = sorted(range(len(text)), key=lambda i: (min(i % cycle, cycle - i % cycle), i))
    if sign > 0:
        return "".join(text[i] for i in order)
    made = [""] * len(text)
    for letter, place in zip(text, order, strict=True):
        made[place] = letter
    return "".join(made)


CIPHERS: dict[str, Callable[[str, Any, int], str]] = {
    "caesar": _caesar,
    "vigenere": _vigenere,
    "substitution": _substitution,
    "atbash": _atbash,
    "rail_fence": _rail_fence,
}
