"""What the rollouts need of an inference engine: ids in, ids with log-probs and versions out."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "repetition", "interrupted"]
"""`repetition`: it said the same over and over; `interrupted`: it may go on where it was broken off."""


class Sampling(msgspec.Struct, frozen=True):
    """How to sample one turn. `temperature=0` is greedy."""

    temperature: float
    max_tokens: int
    seed: int | None = None
    #: End a turn in which a pattern of up to so many tokens comes `repeat_count` times in a row; 0: never.
    repeat_size: int = 0
    repeat_count: int = 0
    #: Nothing but these tokens; empty: all that there are.
    allowed: tuple[int, ...] = ()


class Generation(msgspec.Struct, frozen=True):
    """One sampled turn.

    `logprobs` are natural logs under the sampling temperature, one a token; `weight_spans` says which
    weight version sampled the tokens from which position on: `((0, 3),)` is version 3 throughout.

    `routes`, if asked for, says which experts computed each position, from the first of the prompt to the
    last but one that was sampled: [layers, experts a token] uint16 as bytes, zero in layers without experts.

    `allowed_logprobs`: where `Sampling.allowed` names tokens, those of each as the first one, in that order.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_spans: tuple[tuple[int, int], ...]
    finish_reason: FinishReason
    routes: tuple[bytes, ...] = ()
    allowed_logprobs: tuple[float, ...] = ()

    def followed_by(self, rest: Generation) -> Generation:
        """This one, interrupted, and what was sampled after it, perhaps from later weights."""
        shift, last = len(self.token_ids), self.weight_spans[-1][1] if self.weight_spans else None
        spans = [(start + shift, version) for start, version in rest.weight_spans]
        if spans and spans[0][1] == last:
            del spans[0]
        return Generation(
            self.token_ids + rest.token_ids,
            self.logprobs + rest.logprobs,
            (*self.weight_spans, *spans),
            rest.finish_reason,
            # What was sampled before is replayed as it was.
            self.routes + rest.routes[len(self.routes) :],
            self.allowed_logprobs or rest.allowed_logprobs,
        )


class InferenceEngine(Protocol):
    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Sample a continuation of `prompt_ids`; what `interrupt` breaks off keeps its tokens.

        Raises:
            EngineDeadError: the engine is gone and will not come back by itself.
            GenerationError: this request ended before its turn did; others are not concerned.
        """
        ...


class InterruptibleEngine(InferenceEngine, Protocol):
    async def interrupt(self) -> None:
        """Break off all that is being generated now; each is answered with the tokens that it has.

        Raises:
            EngineDeadError: as `generate`.
        """
        ...


class EngineDeadError(Exception):
    """The inference engine died."""


class GenerationError(Exception):
    """A request gave no whole turn: a failed episode, in an engine that lives."""
