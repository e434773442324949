"""The other side of the counter: a member who wants something, scripted or played by a language model."""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable
from typing import Any, Protocol

import msgspec

from envs.customer_service.cases import Case
from k2rl.errors import ConfigError

DONE = "[DONE]"
"""What a played member writes when there is nothing more to say."""
REQUEST_S = 120.0


class User(Protocol):
    """A member; says nothing more (None) when they leave."""

    def opening(self) -> str | Awaitable[str]: ...

    def reply(self, said: str) -> str | Awaitable[str | None] | None:
        """What the member says to the clerk's words."""


class ScriptedUser(msgspec.Struct):
    """Says who they are when asked, tells more when asked, and leaves when all is said and answered.

    The same words get the same replies; every reply uses something up, so that the talk comes to an end.
    """

    case: Case
    #: What has not been said yet, in the order in which it is said if no word of the clerk's asks for it.
    left: list[str] = msgspec.field(default_factory=lambda: ["who", "details", "patience"])

    def opening(self) -> str:
        return f"Hello! {self.case.wish}"

    def reply(self, said: str) -> str | None:
        if not self.left:
            return None
        asks_who = re.search(r"\b(name|birth|born|who are you)\b", said, re.IGNORECASE)
        part = "who" if asks_who and "who" in self.left else self._next(said)
        if part is None:
            return None
        self.left.remove(part)
        member = self.case.library.members[self.case.member]
        return {
            "who": f"I am {member.name}, born on {member.born}.",
            "details": self.case.details,
            "patience": "All right. Is it done, then?",
        }[part]

    def _next(self, said: str) -> str | None:
        """The next part; a clerk who asks nothing once they know who it is has done what there is to do."""
        if "who" not in self.left and "?" not in said:
            return None
        return next((part for part in self.left if part != "who"), None) or self.left[0]


PLAYED = """\
You play a member of a library who writes to a clerk. Stay in your part and never be the clerk.
You are {name}, born on {born}. You want this: {wish} {details}
Say who you are only when you are asked. Write one or two short sentences at a time. If the clerk refuses and
says why, accept it. When the clerk has said that it is done, or has refused, write {done} alone."""


class PlayedUser:
    """A member played by a model at an OpenAI-compatible endpoint; the key, if any, is `$OPENAI_API_KEY`."""

    def __init__(self, case: Case, url: str, model: str) -> None:
        """Raises:
        ConfigError: httpx is not installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("a member played by a model needs: pip install httpx") from error
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=REQUEST_S,
        )
        self._model = model
        member = case.library.members[case.member]
        part = PLAYED.format(
            name=member.name, born=member.born, wish=case.wish, details=case.details, done=DONE
        )
        self._talk: list[dict[str, str]] = [
            {"role": "system", "content": part},
            {"role": "user", "content": "Good day! What can I do for you?"},
        ]

    async def opening(self) -> str:
        return await self._say() or "Hello."

    async def reply(self, said: str) -> str | None:
        self._talk.append({"role": "user", "content": said})
        return await self._say()

    async def _say(self) -> str | None:
        """The member's next words; None if they are done.

        Raises:
            RuntimeError, httpx.HTTPError: the endpoint gives none.
        """
        body: dict[str, Any] = {"model": self._model, "messages": self._talk, "temperature": 0.0}
        answer = (await self._client.post("chat/completions", json=body)).raise_for_status().json()
        try:
            said = str(answer["choices"][0]["message"]["content"] or "").strip()
        except (KeyError, IndexError, TypeError) as error:
            raise RuntimeError(
                f"the member's endpoint gives no chat completion: {str(answer)[:200]}"
            ) from error
        self._talk.append({"role": "assistant", "content": said})
        return None if DONE in said or not said else said

    async def close(self) -> None:
        await self._client.aclose()
