"""A model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import httpx

from envs.base import TextEnv
from envs.tools.formats import introduced
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.policies import ContextFullError, Reply
from k2rl.seeds import derive_seed
from k2rl.types import Message, Task

REQUEST_S = 600.0
CONNECT_S = 10.0
TRIES = 5
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)


class ChatModel:
    """Chat completions over HTTP, with retries of what may pass; the key, if any, is `$OPENAI_API_KEY`."""

    def __init__(
        self,
        url: str,
        name: str,
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        tool_role: str = "user",
        identity: str = "",
        first_wait_s: float = 1.0,
    ) -> None:
        """`tool_role`: as whom tools speak. Our tools answer to text, not to calls of the API, for which it
        would ask of a message by `tool`; a server of our own takes that role as the model was trained on it.
        """
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(REQUEST_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
        )
        self._url = url
        self._name = name
        self._temperature, self._max_tokens, self._seed = temperature, max_tokens, seed
        self._tool_role = tool_role
        self._first_wait_s = first_wait_s
        self.identity: str | None = identity or f"{url} {name}"

    async def connect(self) -> None:
        """Find the model's name, if none was given.

        Raises:
            ConfigError: nobody answers there, or it serves several models.
        """
        if self._name:
            return
        try:
            answer = await self._client.get("models")
            names = [str(model["id"]) for model in answer.raise_for_status().json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"model={self._url}: no list of models there ({error!r}); name=NAME gives one"
            ) from error
        if len(names) != 1:
            raise ConfigError(
                f"model={self._url} serves {', '.join(names) or 'nothing'}; choose with name=NAME"
            )
        self._name = names[0]
        if self.identity is not None and self.identity.endswith(" "):
            self.identity += self._name

    async def turn(
        self, task: Task, messages: Sequence[Message], number: int, sample: int, env: TextEnv
    ) -> Reply:
        body = {
            "model": self._name,
            "messages": [self._spelled(message) for message in introduced(messages, env.tools)],
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
            "seed": derive_seed(self._seed, task.id, sample, number) % 2**31,
        }
        answer = await self._post(body)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError("content is no text")
            truncated = choice.get("finish_reason") == "length"
            spent = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise RunError(
                f"model={self._url} answered with no chat completion: {str(answer)[:200]}"
            ) from error
        return Reply(text, *spent, truncated)

    def _spelled(self, message: Message) -> dict[str, str]:
        return {
            "role": self._tool_role if message.role == "tool" else message.role,
            "content": message.content,
        }

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(self._first_wait_s * 2 ** (attempt - 1))
            try:
                answer = await self._client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code in RETRIED:
                problem = f"HTTP {answer.status_code}"
                continue
            if answer.status_code == 400 and "context" in answer.text.lower():
                raise ContextFullError(answer.text[:300])
            if answer.is_error:
                raise RunError(f"model={self._url}: HTTP {answer.status_code}: {answer.text[:200]}")
            try:
                content: dict[str, Any] = answer.json()
            except ValueError as error:
                raise RunError(f"model={self._url} answered with no JSON: {answer.text[:200]}") from error
            return content
        raise RunError(f"model={self._url} does not answer, {TRIES} tries: {problem}")

    async def close(self) -> None:
        await self._client.aclose()
