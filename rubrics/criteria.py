"""Rubrics as text: criteria with ordered choices, in YAML files or in a task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from k2rl.errors import ConfigError
from k2rl.types import prepare

SHIPPED = files("rubrics") / "texts"

Provenance = Literal["core", "prescriptive", "human"]


class Criterion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to look at. `choices` go from the worst to the best; `{label: value}` gives them values."""

    name: str
    text: str
    choices: list[str] | dict[str, float] = msgspec.field(default_factory=lambda: ["no", "partly", "yes"])
    weight: float = 1.0
    #: An answer with the worst choice here gets nothing, whatever else there is to it.
    mandatory: bool = False

    @property
    def labels(self) -> list[str]:
        return list(self.choices)

    def value(self, label: str) -> float:
        """A choice between 0 (the worst) and 1."""
        if isinstance(self.choices, dict):
            values = list(self.choices.values())
            return (self.choices[label] - values[0]) / (values[-1] - values[0])
        return self.choices.index(label) / (len(self.choices) - 1)


class Criteria(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rubric."""

    name: str
    version: int
    provenance: Provenance
    criteria: list[Criterion]

    @property
    def identity(self) -> str:
        return f"{self.name}@{self.version}"


class _UniqueLoader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error."""


def _unique(loader: _UniqueLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)


def load(name: str) -> Criteria:
    """A rubric by the name of a shipped one, or from a file.

    Raises:
        ConfigError: one line: there is none, or what is wrong with it.
    """
    shipped = sorted(
        path.name.removesuffix(".yaml") for path in SHIPPED.iterdir() if path.name.endswith(".yaml")
    )
    try:
        text = (SHIPPED / f"{name}.yaml" if name in shipped else Path(name)).read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"rubric {name!r} is none of {', '.join(shipped)} and no readable file ({type(error).__name__})"
        ) from error
    try:
        content = yaml.load(text, _UniqueLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"rubric {name!r} is no YAML: {' '.join(str(error).split())[:200]}") from error
    try:
        found = msgspec.convert(content, Criteria)
        check(found.criteria)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"rubric {name!r}: {error}") from error
    return found


def check(criteria: Sequence[Criterion]) -> None:
    """Whether criteria can be judged by.

    Raises:
        ValueError: one line, about the first that cannot.
    """
    names = [" ".join(criterion.name.casefold().split()) for criterion in criteria]
    for criterion, name in zip(criteria, names, strict=True):
        if not name or not criterion.text.strip():
            raise ValueError(f"criterion {criterion.name!r} has no name or no text")
        if names.count(name) > 1:
            raise ValueError(f"criterion {criterion.name!r} is there twice")
        if not (math.isfinite(criterion.weight) and criterion.weight >= 0):
            raise ValueError(f"criterion {criterion.name!r}: weight={criterion.weight} must be 0 or more")
        labels = [label.strip().casefold() for label in criterion.labels]
        if len(labels) < 2 or len(set(labels)) != len(labels) or "" in labels:
            raise ValueError(f"criterion {criterion.name!r} needs two different choices or more")
        if isinstance(criterion.choices, dict):
            values = list(criterion.choices.values())
            if not all(map(math.isfinite, values)) or any(a >= b for a, b in itertools.pairwise(values)):
                raise ValueError(
                    f"criterion {criterion.name!r}: choices out of order: from the worst to the best"
                )
    total = math.fsum(criterion.weight for criterion in criteria)
    if not (math.isfinite(total) and total > 0):
        raise ValueError(f"the weights of the criteria sum to {total:g}; they must sum to more than 0")


def from_task(spec: Any) -> list[Criterion]:
    """The criteria in a task's data.

    Raises:
        ValueError: one line, about what is wrong with them.
    """
    try:
        criteria = msgspec.convert(spec, list[Criterion])
    except msgspec.ValidationError as error:
        raise ValueError(f"the task's rubric: {error}") from error
    check(criteria)
    return criteria


prepare(Criteria, Criterion)
