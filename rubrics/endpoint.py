"""A model behind an OpenAI-compatible endpoint, as a judge."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec

from k2rl.types import Message, prepare
from rubrics.models import JudgeError, Usage

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT_S = 30.0
MOST_TOP_LOGPROBS = 20
"""More no OpenAI-compatible server is bound to tell."""


class EndpointSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An OpenAI-compatible endpoint; its key is the environment variable `key_variable`."""

    url: str
    name: str
    temperature: float = 0.0
    max_tokens: int = 1024
    timeout_s: float = 60.0
    retries: int = 3
    max_concurrent: int = 16
    #: The server can be held to a JSON schema (`response_format`).
    constrained: bool = False
    key_variable: str = "OPENAI_API_KEY"
    #: Price of a million tokens, for the cost that is reported.
    prompt_price: float = 0.0
    completion_price: float = 0.0


class Endpoint:
    """Chat completions over HTTP. What passes (429, 503, no connection) is tried again; the rest fails."""

    def __init__(self, settings: EndpointSettings, first_wait_s: float = 1.0) -> None:
        """Raises:
        ValueError: a setting makes no sense.
        """
        if not settings.url.startswith(("http://", "https://")):
            raise ValueError(f"url={settings.url!r} must begin with http:// or https://")
        if settings.max_tokens < 1 or settings.retries < 0 or settings.max_concurrent < 1:
            raise ValueError("max_tokens and max_concurrent must be above 0, retries not negative")
        if not (settings.timeout_s > 0 and math.isfinite(settings.temperature) and settings.temperature >= 0):
            raise ValueError("timeout_s must be above 0, temperature finite and not negative")
        self.settings, self._first_wait_s = settings, first_wait_s
        self.usage = Usage()
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots = asyncio.Semaphore(settings.max_concurrent)

    @property
    def identity(self) -> str:
        return f"{self.settings.name}@{self.settings.url}, temperature {self.settings.temperature:g}"

    async def reply(
        self, messages: Sequence[Message], *, seed: int, schema: Mapping[str, Any] | None = None
    ) -> str:
        body = self._body(messages, seed)
        if schema is not None and self.settings.constrained:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            }
        choice = await self._choice(body)
        text = choice["message"]["content"]
        if not isinstance(text, str) or not text.strip():
            raise JudgeError(f"judge {self.settings.url} gave an empty reply")
        if choice.get("finish_reason") == "length":
            raise JudgeError(
                f"judge {self.settings.url}: its reply was cut at max_tokens={self.settings.max_tokens}"
            )
        return text

    async def weigh(
        self, messages: Sequence[Message], words: Sequence[str], *, seed: int
    ) -> dict[str, float]:
        """Of the likeliest first tokens: one counts for the word that it begins, and for no other's."""
        body = self._body(messages, seed) | {
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": MOST_TOP_LOGPROBS,
        }
        choice = await self._choice(body)
        weights = dict.fromkeys(words, 0.0)
        try:
            for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
                said = entry["token"].strip().casefold()
                begun = [word for word in words if said and word.casefold().startswith(said)]
                if len(begun) == 1:
                    weights[begun[0]] += math.exp(float(entry["logprob"]))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise JudgeError(
                f"judge {self.settings.url} tells no log-probs of its tokens (top_logprobs): "
                "by_probability=false takes its word"
            ) from error
        total = math.fsum(weights.values())
        if not (total > 0 and math.isfinite(total)):
            raise JudgeError(
                f"judge {self.settings.url}: none of its likeliest tokens begins one of: {', '.join(words)}"
            )
        return {word: weight / total for word, weight in weights.items()}

    def _body(self, messages: Sequence[Message], seed: int) -> dict[str, Any]:
        return {
            "model": self.settings.name,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
            "seed": seed,
        }

    async def _choice(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The completion's only choice, whose text is a string or missing; raises JudgeError."""
        answer = await self._post(body)
        try:
            choice: dict[str, Any] = answer["choices"][0]
            usage = answer.get("usage") or {}
            choice["message"]["content"], choice.get("finish_reason")
            self._count(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise JudgeError(
                f"judge {self.settings.url} answered with no chat completion: {str(answer)[:200]}"
            ) from error
        return choice

    def _count(self, prompt: int, completion: int) -> None:
        self.usage.requests += 1
        self.usage.prompt_tokens += prompt
        self.usage.completion_tokens += completion
        self.usage.cost += (
            prompt * self.settings.prompt_price + completion * self.settings.completion_price
        ) / 1e6

    async def _post(self, body: Mapping[str, Any]) -> Any:
        problem, wait = "", self._first_wait_s
        for attempt in range(self.settings.retries + 1):
            if attempt:
                await asyncio.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
            try:
                async with self._slots:
                    answer = await self._http().post("chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code in RETRIED:
                problem = f"HTTP {answer.status_code}"
                wait = _asked_wait(answer, wait)
                continue
            if answer.is_error or answer.is_redirect:
                raise JudgeError(f"judge {self.settings.url}: HTTP {answer.status_code}: {answer.text[:200]}")
            try:
                return answer.json()
            except ValueError as error:
                kind = answer.headers.get("content-type", "no content type")
                raise JudgeError(
                    f"judge {self.settings.url} answered with no JSON ({kind}): {answer.text[:100]!r}; "
                    "is its url the one that ends in /v1?"
                ) from error
        raise JudgeError(
            f"judge {self.settings.url} does not answer, {self.settings.retries + 1} tries: {problem}"
        )

    def _http(self) -> httpx.AsyncClient:
        """A client of the running loop."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            key = os.environ.get(self.settings.key_variable)
            self._client = httpx.AsyncClient(
                base_url=self.settings.url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self.settings.timeout_s, connect=min(10.0, self.settings.timeout_s)),
            )
            self._loop, self._slots = loop, asyncio.Semaphore(self.settings.max_concurrent)
        return self._client

    async def close(self) -> None:
        if self._client is not None and self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._client = None


def _asked_wait(answer: httpx.Response, otherwise: float) -> float:
    try:
        asked = float(answer.headers["retry-after"])
    except (KeyError, ValueError):
        return otherwise
    return min(asked, LONGEST_WAIT_S) if asked >= 0 else otherwise


prepare(EndpointSettings)
