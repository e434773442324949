"""The policy as a judge: its replies come from the run's own inference engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from k2rl.config import Config
from k2rl.inference.engine import Generation, GenerationError, InferenceEngine, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.types import Message
from rubrics.models import JudgeError, Usage


class EngineModel:
    """A `JudgeModel`: greedy replies of the weights that the engine has at the time.

    It is held to a schema that is a choice of words, by their first tokens, and to no other.
    """

    def __init__(self, engine: InferenceEngine, chat: ChatTemplate, config: Config) -> None:
        self._engine, self._chat = engine, chat
        self._context = config.inference.max_model_len
        self._most = config.rubric.max_tokens
        self.usage = Usage()
        #: The weight version of the last reply.
        self.version = -1

    @property
    def identity(self) -> str:
        return f"policy@{self.version}"

    async def reply(
        self, messages: Sequence[Message], *, seed: int, schema: Mapping[str, Any] | None = None
    ) -> str:
        words = self._words((schema or {}).get("enum", ()))
        made = await self._generated(messages, tuple(words), seed)
        return words[made.token_ids[0]] if words else self._chat.decode(made.token_ids)

    async def weigh(
        self, messages: Sequence[Message], words: Sequence[str], *, seed: int
    ) -> dict[str, float]:
        first = self._words(words)
        if not first:
            raise JudgeError(
                f"two of the words begin with the same token, so none has a probability: {', '.join(words)}"
            )
        made = await self._generated(messages, tuple(first), seed)
        weights = [math.exp(logprob) for logprob in made.allowed_logprobs]
        total = math.fsum(weights)
        return {word: weight / total for word, weight in zip(first.values(), weights, strict=True)}

    async def _generated(
        self, messages: Sequence[Message], allowed: tuple[int, ...], seed: int
    ) -> Generation:
        """A greedy reply, or one of the tokens that are allowed; raises JudgeError."""
        prompt = self._chat.prompt_ids(messages)
        room = self._context - len(prompt)
        if room <= 0:
            raise JudgeError(
                f"a judge's prompt of {len(prompt)} tokens does not fit "
                f"inference.max_model_len={self._context}"
            )
        try:
            most = 1 if allowed else min(room, self._most)
            made = await self._engine.generate(prompt, Sampling(0.0, most, seed, allowed=allowed))
        except GenerationError as error:
            raise JudgeError(f"the engine gave no reply: {error}") from error
        self.version = made.weight_spans[-1][1] if made.weight_spans else self.version
        self.usage.requests += 1
        self.usage.prompt_tokens += len(prompt)
        self.usage.completion_tokens += len(made.token_ids)
        return made

    def _words(self, words: Sequence[str]) -> dict[int, str]:
        """Words to choose from, by the token that each begins with; empty, if two begin alike."""
        first = {self._chat.turn_ids(word)[0]: word for word in words}
        return first if len(first) == len(words) else {}
