"""Gymnasium spaces of chats: observations are tuples of messages, actions are free text."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import Any, get_args

import msgspec
import numpy as np
from gymnasium.spaces import Space

from k2rl.types import Message, Role, ToolCall

_SAMPLE_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
_MAX_SAMPLE_LENGTH = 32
_MAX_SAMPLE_MESSAGES = 4

Seed = int | np.random.Generator | None


class FreeText(Space[str]):
    """All strings. Samples are short and printable."""

    def __init__(self, seed: Seed = None) -> None:
        super().__init__(dtype=str, seed=seed)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """A random string.

        Raises:
            ValueError: if a mask or probabilities are given; there is nothing to mask.
        """
        _refuse_masks(self, mask, probability)
        return _sample_text(self.np_random)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreeText)

    def __repr__(self) -> str:
        return "FreeText()"


class ChatSpace(Space[tuple[Message, ...]]):
    """Tuples of messages, the empty one among them, whose roles are all in `roles`."""

    def __init__(self, roles: Iterable[Role] = ("system", "user", "tool"), seed: Seed = None) -> None:
        """A space of messages with these roles; by default all but the policy's own.

        Raises:
            ValueError: if there is no role or one that messages do not have.
        """
        self.roles: tuple[Role, ...] = tuple(dict.fromkeys(roles))
        if not self.roles or not set(self.roles) <= set(get_args(Role)):
            raise ValueError(f"roles={self.roles} must be some of {get_args(Role)}")
        super().__init__(seed=seed)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> tuple[Message, ...]:
        """A random chat of a few messages.

        Raises:
            ValueError: if a mask or probabilities are given; there is nothing to mask.
        """
        _refuse_masks(self, mask, probability)
        length = int(self.np_random.integers(_MAX_SAMPLE_MESSAGES + 1))
        return tuple(self._sample_message() for _ in range(length))

    def _sample_message(self) -> Message:
        role = self.roles[int(self.np_random.integers(len(self.roles)))]
        return Message(role=role, content=_sample_text(self.np_random))

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(self._contains_message(message) for message in x)

    def _contains_message(self, message: Any) -> bool:
        return (
            isinstance(message, Message)
            and message.role in self.roles
            and isinstance(message.content, str)
            and isinstance(message.tool_calls, tuple)
            and all(isinstance(call, ToolCall) for call in message.tool_calls)
            and isinstance(message.tool_call_id, str | None)
        )

    def to_jsonable(self, sample_n: Iterable[tuple[Message, ...]]) -> list[Any]:
        """Chats as JSON values."""
        return [msgspec.to_builtins(list(chat)) for chat in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[tuple[Message, ...]]:
        """Chats from what `to_jsonable` gave.

        Raises:
            msgspec.ValidationError: if it is something else.
        """
        return msgspec.convert(sample_n, list[tuple[Message, ...]])

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatSpace) and set(self.roles) == set(other.roles)

    def __repr__(self) -> str:
        return f"ChatSpace(roles={self.roles})"


def _sample_text(generator: np.random.Generator) -> str:
    length = int(generator.integers(_MAX_SAMPLE_LENGTH + 1))
    indices = generator.integers(len(_SAMPLE_CHARACTERS), size=length)
    return "".join(_SAMPLE_CHARACTERS[index] for index in indices)


def _refuse_masks(space: Space[Any], mask: Any, probability: Any) -> None:
    if mask is not None or probability is not None:
        raise ValueError(f"{space} cannot be sampled with a mask or probabilities")
