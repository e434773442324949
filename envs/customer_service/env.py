"""A clerk's work as an environment: talk with a member, keep to the rules, leave the right state behind."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Iterator
from inspect import isawaitable
from itertools import count
from typing import Any

import msgspec

from envs.answers import split_of
from envs.base import Messages
from envs.customer_service.cases import CASES, Case, draw
from envs.customer_service.library import POLICY, Library
from envs.customer_service.users import PlayedUser, ScriptedUser, User
from envs.tools import ToolEnv, calling, tool
from k2rl.errors import ConfigError
from k2rl.types import Message, Split, Task, prepare

EVAL_ONE_IN = 6


class _Saved(msgspec.Struct):
    """A running episode, as `snapshot` writes it."""

    case: Case
    library: Library
    left: list[str]
    said: list[str]
    calls: int


class ServiceEnv(ToolEnv):
    """A library's clerk: a member who wants something, a policy in words, tools that change a backend.

    The episode is over when the member leaves. The reward is 1 if the backend is then as the rules want it
    and the member was told what they had to be told, else 0. Components: `state_right` and `told`.
    """

    kinds = tuple(CASES)
    parallel = False

    def __init__(
        self, format: str = "auto", user: str = "scripted", user_model: str = "", max_words: int = 12
    ) -> None:
        """`user`: `scripted`, or the address of an OpenAI-compatible endpoint that plays the member, as model
        `user_model`; `max_words`: messages to the member after which they lose patience.

        Raises:
            ConfigError: the user is neither, or has no model.
        """
        super().__init__(format)
        if user != "scripted" and not user.startswith(("http://", "https://")):
            raise ConfigError(f"user={user!r} is neither `scripted` nor an address, http://HOST:PORT/v1")
        if user != "scripted" and not user_model:
            raise ConfigError("a member played by a model needs user_model=NAME")
        self._url, self._model, self._max_words = user, user_model, max_words
        self._user: User | None = None
        self._said: list[str] = []

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        """The kinds of case in turn; who asks decides which split a case belongs to."""
        for place in count():
            id = f"customer_service/{split}/{seed}/{place}"
            rng, kind = random.Random(id), self.kinds[place % len(self.kinds)]
            while True:
                case = draw(kind, rng)
                if split_of(case.library.members[case.member].name, EVAL_ONE_IN) == split:
                    break
            data = {"case": msgspec.json.decode(msgspec.json.encode(case))}
            yield Task(id, "customer_service", kind, split, seed, data)

    def begin(self, task: Task) -> Messages | Awaitable[Messages]:
        self._case = _case_of(task)
        self._library = msgspec.convert(msgspec.to_builtins(self._case.library), Library)
        self._said = []
        self._user = (
            ScriptedUser(self._case)
            if self._url == "scripted"
            else PlayedUser(self._case, self._url, self._model)
        )
        opening = self._user.opening()
        if isinstance(opening, str):
            return self._opened(opening)

        async def opened() -> Messages:
            assert isawaitable(opening)
            return self._opened(await opening)

        return opened()

    def _opened(self, opening: str) -> Messages:
        return (Message("system", POLICY), Message("user", opening))

    def answer(self, text: str) -> Messages | Awaitable[Messages]:
        assert self._user is not None
        self._said.append(text)
        if len(self._said) > self._max_words:
            return self._judged(truncated=True)
        reply = self._user.reply(text)
        if not isawaitable(reply):
            return self._replied(reply)

        async def replied() -> Messages:
            return self._replied(await reply)

        return replied()

    def _replied(self, reply: str | None) -> Messages:
        return self._judged() if reply is None else (Message("user", reply),)

    def _judged(self, truncated: bool = False) -> Messages:
        """End the episode: what should the backend be, and what should have been said?"""
        wanted = msgspec.convert(msgspec.to_builtins(self._case.library), Library)
        for name, arguments in self._case.actions:
            _do(wanted, name, arguments)
        state = float(self._library == wanted)
        words = " ".join(self._said).casefold()
        told = float(all(any(word.casefold() in words for word in group) for group in self._case.told))
        detail = "" if state else "the backend is not as the rules want it"
        components = {"state_right": state, "told": told}
        return self.end(state * told, components, truncated=truncated, detail=detail)

    @tool
    def find_member(self, name: str, born: str) -> dict[str, str]:
        """Find a member's number.

        Args:
            name: full name
            born: date of birth, as YYYY-MM-DD
        """
        return {"member_id": self._library.find_member(name, born).id}

    @tool
    def show_member(self, member_id: str) -> dict[str, Any]:
        """A member's loans, holds and fees."""
        shown: dict[str, Any] = msgspec.to_builtins(self._library.member(member_id))
        return shown

    @tool
    def search_titles(self, words: str) -> list[dict[str, Any]]:
        """Titles whose name has one of these words, with their free copies and how many members wait."""
        return [
            {**msgspec.to_builtins(title), "holds": len(self._library.holders(title.id))}
            for title in self._library.search(words)
        ]

    @tool
    def show_title(self, title_id: str) -> dict[str, Any]:
        """A title, with its free copies and the members who wait for it."""
        title = self._library.title(title_id)
        return {**msgspec.to_builtins(title), "holds": self._library.holders(title.id)}

    @tool
    def renew_loan(self, member_id: str, loan_id: str) -> str:
        """Renew a member's loan."""
        return _do(self._library, "renew_loan", {"member_id": member_id, "loan_id": loan_id})

    @tool
    def place_hold(self, member_id: str, title_id: str) -> str:
        """Put a member on a title's waiting list."""
        return _do(self._library, "place_hold", {"member_id": member_id, "title_id": title_id})

    @tool
    def cancel_hold(self, member_id: str, title_id: str) -> str:
        """Strike a member off a title's waiting list."""
        return _do(self._library, "cancel_hold", {"member_id": member_id, "title_id": title_id})

    @tool
    def waive_fee(self, member_id: str, fee_id: str) -> str:
        """Let a member off a fee."""
        return _do(self._library, "waive_fee", {"member_id": member_id, "fee_id": fee_id})

    @tool
    def hand_over(self, subject: str) -> str:
        """Hand the matter over to a person.

        Args:
            subject: what it is about
        """
        return _do(self._library, "hand_over", {"subject": subject})

    def demonstration(self, task: Task) -> list[str | Message]:
        case = _case_of(task)
        member = case.library.members[case.member]
        turns: list[str | Message] = ["Gladly. What is your full name, and when were you born?"]
        turns.append(calling("find_member", 0, name=member.name, born=member.born))
        turns.append(calling("show_member", 1, member_id=member.id))
        turns += [calling(name, 2 + n, **arguments) for n, (name, arguments) in enumerate(case.actions)]
        if case.actions:
            return [*turns, "That is done. Have a good day."]
        reasons = ", ".join(group[0] for group in case.told)
        return [*turns, f"I am sorry, our rules do not allow that. The reason: {reasons}."]

    def snapshot(self) -> bytes | None:
        """A scripted member's episode; one that a model plays has none."""
        if not isinstance(self._user, ScriptedUser):
            return None
        saved = _Saved(self._case, self._library, self._user.left, self._said, self._toolbox.count)
        return msgspec.json.encode(saved)

    def restore(self, task: Task, snapshot: bytes) -> None:
        saved = msgspec.json.decode(snapshot, type=_Saved)
        self._case, self._library, self._said = saved.case, saved.library, saved.said
        self._user = ScriptedUser(saved.case, saved.left)
        self.resume(saved.calls)

    async def close(self) -> None:  # type: ignore[override]
        """End the connection to the member's model."""
        user, self._user = self._user, None
        if isinstance(user, PlayedUser):
            await user.close()


def _case_of(task: Task) -> Case:
    return msgspec.convert(task.data["case"], Case)


def _do(library: Library, name: str, arguments: dict[str, str]) -> str:
    """An action that changes the library, a method of its own; gives what its tool says."""
    done: str = getattr(library, name)(**arguments)
    return done


prepare(_Saved, Case, Library)
