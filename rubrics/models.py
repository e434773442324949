"""Models that judge: a function, the one that a run trains, one behind an endpoint (`rubrics.endpoint`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from k2rl.types import Message
from rubrics.base import Rubric


class JudgeError(Exception):
    """A judge gave no judgement: a failure, and no score."""


class Usage(msgspec.Struct):
    """What a model's replies have cost."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class JudgeModel(Protocol):
    """Who replies to a judge's prompt."""

    @property
    def identity(self) -> str:
        """Name and version: verdicts carry it, and are kept under it."""

    usage: Usage

    async def reply(
        self, messages: Sequence[Message], *, seed: int, schema: Mapping[str, Any] | None = None
    ) -> str:
        """The reply, of this JSON schema if the model can be held to it; `{"enum": …}` stands for bare words.

        Raises:
            JudgeError: there is none.
        """

    async def weigh(
        self, messages: Sequence[Message], words: Sequence[str], *, seed: int
    ) -> dict[str, float]:
        """The probability of each of these words as the reply, where it must be one of them.

        Raises:
            JudgeError: they cannot be known.
        """


class Scripted:
    """A function as a model."""

    def __init__(self, function: Callable[[Sequence[Message], int], str], identity: str = "scripted") -> None:
        self._function, self._identity = function, identity
        self.usage = Usage()

    @property
    def identity(self) -> str:
        return self._identity

    async def reply(
        self, messages: Sequence[Message], *, seed: int, schema: Mapping[str, Any] | None = None
    ) -> str:
        self.usage.requests += 1
        return self._function(messages, seed)

    async def weigh(
        self, messages: Sequence[Message], words: Sequence[str], *, seed: int
    ) -> dict[str, float]:
        """It is sure of what it says."""
        said = await self.reply(messages, seed=seed)
        if said not in words:
            raise JudgeError(f"the verdict is {said[:120]!r}, none of: {', '.join(words)}")
        return {word: float(word == said) for word in words}


class RunModel:
    """The model of a run, which binds it; its version is that of the weights it has at the time."""

    def __init__(self) -> None:
        self.bound: JudgeModel | None = None
        self.usage = Usage()

    @property
    def identity(self) -> str:
        return "policy" if self.bound is None else self.bound.identity

    async def reply(
        self, messages: Sequence[Message], *, seed: int, schema: Mapping[str, Any] | None = None
    ) -> str:
        return await self._run().reply(messages, seed=seed, schema=schema)

    async def weigh(
        self, messages: Sequence[Message], words: Sequence[str], *, seed: int
    ) -> dict[str, float]:
        return await self._run().weigh(messages, words, seed=seed)

    def _run(self) -> JudgeModel:
        if self.bound is None:
            raise JudgeError(
                "model=policy is the model of a run, and there is no run: name an endpoint, url=…"
            )
        self.usage = self.bound.usage
        return self.bound


def model_from(spec: Any) -> JudgeModel:
    """A model as configuration spells it: `policy`, `{url: …, name: …}`, or one that is made already.

    Raises:
        ValueError: one line, about what is wrong.
    """
    if spec == "policy":
        return RunModel()
    if isinstance(spec, Mapping):
        # Here: judges that ask nobody need no HTTP client.
        from rubrics.endpoint import Endpoint, EndpointSettings

        try:
            return Endpoint(msgspec.convert(dict(spec), EndpointSettings))
        except msgspec.ValidationError as error:
            raise ValueError(f"model: {error}") from error
    if spec is None or isinstance(spec, str):
        raise ValueError(f"model={spec!r} must be policy, or an endpoint: {{url: http://…/v1, name: …}}")
    model: JudgeModel = spec
    return model


def models_of(rubric: Rubric) -> list[JudgeModel]:
    """The models that a rubric and its parts ask."""
    own = getattr(rubric, "model", None)
    found = [] if own is None else [own]
    return found + [model for part in rubric.parts() for model in models_of(part)]


def asks_run_model(rubric: Rubric) -> bool:
    """Whether it asks the model of a run, which changes as it learns."""
    return any(isinstance(model, RunModel) for model in models_of(rubric))


def bind_run_model(rubric: Rubric, model: JudgeModel) -> bool:
    """Let `model` reply wherever the rubric names that of the run; whether it does anywhere."""
    waiting = [found for found in models_of(rubric) if isinstance(found, RunModel)]
    for found in waiting:
        found.bound = model
    return bool(waiting)
