"""The vocabulary every room speaks: tasks, messages, trajectories and verdicts.

Nothing here imports torch, Ray or vLLM, so `envs`, `rubrics` and `sandboxes` can be used alone.
All records are msgspec structs: typed, cheap to copy between processes and to write as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal

import msgspec

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "eval"]
StopReason = Literal[
    "env_done", "env_truncated", "max_turns", "token_budget", "context", "repetition", "failed"
]

NO_WEIGHT_VERSION = -1
"""Weight version of tokens that no policy sampled (prompts, tool results)."""


def prepare(*kinds: type | UnionType) -> None:
    """Let msgspec work out how these types are decoded: for the end of modules whose structs threads decode.

    It does so at a type's first use, and two threads that come to that at once end the process with a
    segmentation fault (msgspec 0.22). Environments and judges run in threads.
    """
    for kind in kinds:
        msgspec.json.Decoder(kind)


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool by the policy; `id` follows K2: `functions.{name}:{index}`."""

    id: str
    name: str
    arguments: dict[str, Any]


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool as a model is told of it; `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: dict[str, Any]


class Message(msgspec.Struct, frozen=True):
    """One chat message. `content` is what the chat template renders."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Task(msgspec.Struct, frozen=True):
    """What one episode is about.

    `kind` is the task type: token budgets and metrics are kept per kind. `data` is whatever the
    environment needs to reset to exactly this task (JSON values only).
    """

    id: str
    env: str
    kind: str
    split: Split
    seed: int
    data: dict[str, Any] = {}


class Evidence(msgspec.Struct, frozen=True):
    """What a verdict rests on: a span of the answer, a test's result, a sentence of the judge's."""

    text: str
    #: The component it speaks of; empty: the whole.
    component: str = ""
    #: Whether it speaks for the answer; None: neither for nor against it.
    passed: bool | None = None
    #: Characters of the judged text, from and up to.
    span: tuple[int, int] | None = None


class Verdict(msgspec.Struct, frozen=True):
    """A judge's answer: either a finite value with named components, or a failure with its reason.

    A failure is not a score (`value is None`): it is masked from the loss, counted and shown. The range of
    values is the judge's (`Rubric.reward_range`).
    """

    value: float | None
    components: dict[str, float] = {}
    failure: str | None = None
    #: What components count for in the value, where they were weighed.
    weights: dict[str, float] = {}
    evidence: tuple[Evidence, ...] = ()
    #: Who judged, with a version where it has one (`critic@12`); empty: the run's only judge.
    judge: str = ""

    @classmethod
    def scored(
        cls,
        value: float,
        components: dict[str, float] | None = None,
        weights: dict[str, float] | None = None,
        evidence: Sequence[Evidence] = (),
        judge: str = "",
    ) -> Verdict:
        """A verdict with a score.

        Raises:
            ValueError: if the value, a component or a weight is NaN or infinite.
        """
        parts, weights = dict(components or {}), dict(weights or {})
        weighed = {f"weight of {name}": weight for name, weight in weights.items()}
        for name, number in {"value": value, **parts, **weighed}.items():
            if not math.isfinite(number):
                raise ValueError(f"verdict {name} is {number}, not a finite number")
        return cls(float(value), parts, None, weights, tuple(evidence), judge)

    @classmethod
    def failed(cls, reason: str, judge: str = "") -> Verdict:
        """A verdict that could not be reached, and why."""
        return cls(value=None, failure=reason, judge=judge)

    @property
    def ok(self) -> bool:
        return self.failure is None


class Segment(msgspec.Struct, frozen=True):
    """A run of tokens with one author: the policy (`sampled`) or the prompt, environment and tools.

    `logprobs` holds the behaviour log-probability (natural log, under the sampling temperature) of
    each sampled token, and is empty for tokens that were not sampled.
    """

    token_ids: tuple[int, ...]
    sampled: bool
    logprobs: tuple[float, ...] = ()
    weight_version: int = NO_WEIGHT_VERSION

    def __post_init__(self) -> None:
        if self.sampled and len(self.logprobs) != len(self.token_ids):
            raise ValueError(f"{len(self.token_ids)} sampled tokens but {len(self.logprobs)} log-probs")
        if not self.sampled and self.logprobs:
            raise ValueError("tokens that were not sampled have no behaviour log-probs")


class Trajectory(msgspec.Struct):
    """One episode, token by token: the very ids that were sampled, never re-tokenised.

    The first segment is the prompt; trajectories of one group share it. `env_reward` is the sum of
    the environment's own step rewards and `reward_components` what it named; the rubric turns the
    whole into `verdict`.

    An agent that asks the policy twice from one point, or edits what it has been told, makes several
    sequences in one episode. The others are `branches`, without verdicts of their own: tokens that they
    share with an earlier sequence are no longer `sampled` in them, so each is learned from once.
    """

    id: str
    group_id: str
    task: Task
    temperature: float
    segments: list[Segment] = []
    messages: list[Message] = []
    stop_reason: StopReason = "env_done"
    env_reward: float = 0.0
    reward_components: dict[str, float] = {}
    verdict: Verdict | None = None
    seconds: float = 0.0
    branches: list[Trajectory] = []
    #: Of its first positions, if asked for, which experts computed each: see `Generation.routes`.
    routes: list[bytes] = []

    @property
    def token_ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def sampled_mask(self) -> list[bool]:
        """True where the policy wrote the token; same length as `token_ids`."""
        return [segment.sampled for segment in self.segments for _ in segment.token_ids]

    @property
    def behaviour_logprobs(self) -> list[float]:
        """Log-probs of the sampled tokens alone, in order."""
        return [logprob for segment in self.segments for logprob in segment.logprobs]

    @property
    def weight_versions(self) -> list[int]:
        """The weight version of each token; `NO_WEIGHT_VERSION` where it was not sampled."""
        return [segment.weight_version for segment in self.segments for _ in segment.token_ids]

    @property
    def lines(self) -> list[Trajectory]:
        """Its sequences: the trajectory itself, and its branches."""
        return [self, *self.branches]

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote in this episode, branches included."""
        own = sum(len(segment.token_ids) for segment in self.segments if segment.sampled)
        return own + sum(branch.num_sampled for branch in self.branches)

    @property
    def failed(self) -> bool:
        return self.stop_reason == "failed" or (self.verdict is not None and not self.verdict.ok)

    @property
    def reward(self) -> float:
        """The verdict's value.

        Raises:
            ValueError: if the trajectory has no verdict or a failed one.
        """
        if self.verdict is None or self.verdict.value is None:
            raise ValueError(f"trajectory {self.id} has no score: {self.verdict}")
        return self.verdict.value


prepare(Message, Task, ToolSpec, Trajectory, Verdict)
