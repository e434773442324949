"""`@tool`: a function that a policy may call, with the JSON schema of its type hints and docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json

from k2rl.types import ToolSpec

TIMEOUT_S = 30.0
Function: TypeAlias = Callable[..., Any]
_ARGUMENT = re.compile(r"(\w+)(?: *\([^)]*\))?: *(.*)")


class ToolError(Exception):
    """What a tool says to the policy when a call cannot be done; any other exception is a fault of ours."""


@dataclass(frozen=True)
class Tool:
    """A tool: what a model is told, how arguments are checked, and what it does.

    Attributes:
        function: gets the arguments by name; what it gives is text, or becomes JSON.
        arguments: the checked arguments of JSON ones; None takes them as they are.
        timeout_s: a call that takes longer is answered with an error.
    """

    spec: ToolSpec
    function: Function
    arguments: type[BaseModel] | None
    timeout_s: float = TIMEOUT_S

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.function)

    def bind(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments as the function takes them.

        Raises:
            ToolError: they are not what the schema asks for; it names each that is wrong.
        """
        if self.arguments is None:
            return given
        try:
            checked = self.arguments.model_validate_json(to_json(given), strict=True)
        except ValidationError as error:
            raise ToolError(_problems(error)) from error
        return {name: getattr(checked, field) for field, name in _names(self.arguments).items()}

    def __get__(self, instance: object, owner: type | None = None) -> Tool:
        """A tool that is a method, bound to its object."""
        if instance is None:
            return self
        return replace(self, function=self.function.__get__(instance, owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain function, for other code."""
        return self.function(*args, **kwargs)


@overload
def tool(function: Function, /) -> Tool: ...


@overload
def tool(*, name: str | None = None, timeout_s: float = TIMEOUT_S) -> Callable[[Function], Tool]: ...


def tool(
    function: Function | None = None, /, *, name: str | None = None, timeout_s: float = TIMEOUT_S
) -> Tool | Callable[[Function], Tool]:
    """Make a tool of a function or method, plain or `async def`; for methods, of each object's own.

    Its parameters need type hints, and what pydantic understands is understood. The docstring is the tool's
    description; lines `name: text` under `Args:` describe the parameters.

    Raises:
        TypeError: a parameter has no type hint, or is one of `*args` and `**kwargs`.
    """
    if function is None:
        return lambda function: _make(function, name, timeout_s)
    return _make(function, name, timeout_s)


def _make(function: Function, name: str | None, timeout_s: float) -> Tool:
    name = name or function.__name__
    if not timeout_s > 0:
        raise ValueError(f"tool {name}: timeout_s={timeout_s} must be above 0")
    description, described = _documentation(function)
    fields: dict[str, Any] = {}
    for parameter in _parameters(function, name):
        default = ... if parameter.default is parameter.empty else parameter.default
        # Under another name, so that parameters may be called as pydantic's own attributes are.
        about = Field(default, alias=parameter.name, description=described.get(parameter.name))
        fields[f"argument_{parameter.name}"] = (parameter.annotation, about)
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    spec = ToolSpec(name, description, _schema(arguments))
    return Tool(spec, function, arguments, timeout_s)


def _parameters(function: Function, name: str) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"tool {name}: {parameter} cannot be given by name")
        if parameter.annotation is parameter.empty:
            raise TypeError(f"tool {name}: parameter {parameter.name} has no type hint")
    return parameters


def _documentation(function: Function) -> tuple[str, dict[str, str]]:
    """A docstring's text, and what it says of each parameter."""
    text = inspect.cleandoc(function.__doc__ or "")
    head, _, tail = text.partition("\nArgs:\n")
    described: dict[str, str] = {}
    name = ""
    for line in tail.splitlines():
        if line and not line.startswith(" "):
            break
        found = _ARGUMENT.fullmatch(line.strip())
        if found and len(line) - len(line.lstrip()) <= 4:
            name, described[found[1]] = found[1], found[2]
        elif name and line.strip():
            described[name] += f" {line.strip()}"
    head = re.split(r"\n(?:Returns|Raises|Yields):\n", head)[0]
    return " ".join(head.split()), described


def _schema(arguments: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema, without the titles that pydantic makes up."""

    def untitled(value: Any, names: bool = False) -> Any:
        if isinstance(value, list):
            return [untitled(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {key: item for key, item in value.items() if names or key != "title"}
        return {
            key: untitled(item, key in ("properties", "$defs") and not names) for key, item in kept.items()
        }

    schema = {"type": "object", "properties": {}, **untitled(arguments.model_json_schema())}
    schema.pop("additionalProperties", None)
    return schema


def _names(arguments: type[BaseModel]) -> dict[str, str]:
    return {field: str(info.alias) for field, info in arguments.model_fields.items()}


def _problems(error: ValidationError) -> str:
    """One line: each argument with what is wrong with it."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}"
        for problem in error.errors(include_url=False)[:5]
    )


def as_text(result: Any) -> str:
    """What a tool gave, as the policy reads it."""
    return result if isinstance(result, str) else to_json(result).decode()
