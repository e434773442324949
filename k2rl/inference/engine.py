"""What the rollouts need of an inference engine: ids in, ids with log-probs and versions out."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length"]


class Sampling(msgspec.Struct, frozen=True):
    """How to sample one turn. `temperature=0` is greedy."""

    temperature: float
    max_tokens: int
    seed: int | None = None


class Generation(msgspec.Struct, frozen=True):
    """One sampled turn.

    `logprobs` are natural logs under the sampling temperature, one a token; `weight_spans` says which
    weight version sampled the tokens from which position on: `((0, 3),)` is version 3 throughout.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_spans: tuple[tuple[int, int], ...]
    finish_reason: FinishReason


class InferenceEngine(Protocol):
    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Sample a continuation of `prompt_ids`.

        Raises:
            EngineDeadError: the engine is gone and will not come back by itself.
            GenerationError: this request ended before its turn did; others are not concerned.
        """
        ...


class EngineDeadError(Exception):
    """The inference engine died."""


class GenerationError(Exception):
    """A request gave no whole turn: a failed episode, in an engine that lives."""
