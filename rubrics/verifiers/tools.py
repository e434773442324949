"""Whether tools were called as they should have been: by schema, order and what the calls did."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
from jsonschema import exceptions, validators
from referencing import Registry

from k2rl.types import Evidence, ToolCall, Trajectory, Verdict, prepare
from rubrics.base import Rubric
from rubrics.verifiers.base import TaskError


class Backend(Protocol):
    """What tools act on: made anew for each replay, from the task's `initial` state."""

    def apply(self, name: str, arguments: Mapping[str, Any]) -> object:
        """Do a call; raises ValueError if it cannot be done, which leaves the state as it was."""

    def state(self) -> Any:
        """The state, as JSON values."""


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that should be made; arguments that are not named may be anything."""

    name: str
    arguments: dict[str, Any] = {}


class ToolSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `task.data["tool_spec"]` says of right calls."""

    #: The tools there are, with the JSON schema of their arguments.
    tools: dict[str, dict[str, Any]]
    calls: list[Expected] = []
    #: `exact`: these calls, in this order, and no others; `in_order`: in this order, others between them;
    #: `any_order`: these, and no others; `subset`: these, and others.
    order: Literal["exact", "in_order", "any_order", "subset"] = "exact"
    forbidden: list[str] = []
    at_most: int | None = None
    #: The state that the calls must lead to, from `initial`.
    initial: Any = None
    final: Any = None


class ToolCallJudge(Rubric):
    """1 if an episode's calls fit their schemas, are the expected ones in order, and lead where wanted."""

    idempotent = True

    def __init__(self, field: str = "tool_spec", backend: str | None = None, ids: bool = False) -> None:
        """`backend`: `module:Class`, made with the task's `initial`; `ids`: K2's call ids are checked, too.

        Raises:
            ValueError: there is no such class.
        """
        self.field, self.ids = field, ids
        self._backend_name = backend
        self._backend = None if backend is None else _load(backend)

    @property
    def identity(self) -> str:
        return f"ToolCallJudge({self.field}, {self._backend_name}, {self.ids})"

    def content(self, trajectory: Trajectory) -> object:
        return [calls_of(trajectory), trajectory.task.data.get(self.field)]

    async def judge(self, trajectory: Trajectory) -> Verdict:
        try:
            spec = msgspec.convert(trajectory.task.data.get(self.field), ToolSpec)
        except msgspec.ValidationError as error:
            raise TaskError(f"{self.field}: {error}") from error
        if spec.final is not None and self._backend is None:
            raise TaskError(
                f"{self.field}.final needs a backend to replay the calls on: backend=module:Class"
            )
        calls = calls_of(trajectory)
        problems = {
            "schema": _schema_problem(spec, calls) or (_id_problem(calls) if self.ids else ""),
            "order": _order_problem(spec, calls),
            "state": "",
        }
        if spec.final is not None and self._backend is not None:
            problems["state"] = _state_problem(self._backend, spec, calls)
        right = {name: float(not problem) for name, problem in problems.items()}
        evidence = [Evidence(text or "right", name, not text) for name, text in problems.items()]
        return Verdict.scored(float(all(right.values())), right, evidence=evidence)


def calls_of(trajectory: Trajectory) -> list[ToolCall]:
    """The policy's calls, in order."""
    return [
        call for message in trajectory.messages if message.role == "assistant" for call in message.tool_calls
    ]


def _schema_problem(spec: ToolSpec, calls: Sequence[ToolCall]) -> str:
    for call in calls:
        if call.name not in spec.tools:
            return f"there is no tool {call.name!r}"
        if call.name in spec.forbidden:
            return f"tool {call.name!r} was not to be called"
        schema = spec.tools[call.name]
        kind = validators.validator_for(schema, default=validators.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except exceptions.SchemaError as error:
            raise TaskError(f"the schema of tool {call.name!r} is none: {error.message}") from error
        problem = next(iter(kind(schema, registry=Registry()).iter_errors(call.arguments)), None)
        if problem is not None:
            return f"{call.name}: {problem.json_path}: {problem.message}"[:200]
    if spec.at_most is not None and len(calls) > spec.at_most:
        return f"{len(calls)} calls, more than {spec.at_most}"
    return ""


def _id_problem(calls: Sequence[ToolCall]) -> str:
    for number, call in enumerate(calls):
        if call.id != f"functions.{call.name}:{number}":
            return f"call {number} has the id {call.id!r}"
    return ""


def _order_problem(spec: ToolSpec, calls: Sequence[ToolCall]) -> str:
    """Expected calls are matched with different ones of the policy."""
    if spec.order in ("exact", "any_order") and len(calls) != len(spec.calls):
        return f"{len(calls)} calls instead of {len(spec.calls)}"
    if spec.order in ("exact", "in_order"):
        rest = iter(calls)
        for number, expected in enumerate(spec.calls, 1):
            if not any(_is(call, expected) for call in rest):
                return f"expected call {number}, of {expected.name}, is missing or out of order"
        return ""
    matched: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j, call in enumerate(calls):
            if j not in tried and _is(call, spec.calls[i]):
                tried.add(j)
                if j not in matched or place(matched[j], tried):
                    matched[j] = i
                    return True
        return False

    for i, expected in enumerate(spec.calls):
        if not place(i, set()):
            return f"expected call {i + 1}, of {expected.name}, is missing"
    return ""


def _is(call: ToolCall, expected: Expected) -> bool:
    return call.name == expected.name and all(
        name in call.arguments and _same(call.arguments[name], value)
        for name, value in expected.arguments.items()
    )


def _same(one: Any, other: Any) -> bool:
    """Equal JSON values: 1 is 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _state_problem(make: Callable[[Any], Backend], spec: ToolSpec, calls: Sequence[ToolCall]) -> str:
    backend = make(spec.initial)
    for call in calls:
        try:
            backend.apply(call.name, call.arguments)
        except ValueError:
            continue  # as in the episode: a call that cannot be done changes nothing
    return "" if _same(backend.state(), spec.final) else "the calls lead to another state"


def _load(target: str) -> Callable[[Any], Backend]:
    if not re.fullmatch(r"[\w.]+:\w+", target):
        raise ValueError(f"backend={target!r}: write it as module:Class")
    module, _, name = target.partition(":")
    try:
        made: Callable[[Any], Backend] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"backend={target!r}: {error}") from error
    return made


prepare(ToolSpec)
