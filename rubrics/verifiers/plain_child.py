"""Runs in a child process: patterns and schemas of tasks, on answers."""

from __future__ import annotations

import re
from typing import Any

from jsonschema import exceptions, validators
from referencing import Registry

from rubrics.strict_json import strict_json, unfenced


def check(call: list[Any]) -> list[str]:
    """What is wrong with the task, and with the answer; empty: nothing."""
    kind, answer, truth = call
    return list(_regex(answer, truth) if kind == "regex" else _json(answer, truth))


def _regex(answer: str, pattern: Any) -> tuple[str, str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        return f"the task's pattern is none: {error}", ""
    return "", "" if compiled.fullmatch(answer) else "does not match"


def _json(answer: str, schema: Any) -> tuple[str, str]:
    if not isinstance(schema, dict | bool):
        return "the task's schema is no object", ""
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except exceptions.SchemaError as error:
        return f"the task's schema is none: {error.message}", ""
    try:
        value = strict_json(unfenced(answer))
    except (ValueError, RecursionError) as error:
        return "", f"not JSON: {error}"[:200]
    # With a registry of its own nothing that a schema refers to is fetched.
    problem = next(iter(kind(schema, registry=Registry()).iter_errors(value)), None)
    return "", "" if problem is None else f"{problem.json_path}: {problem.message}"[:200]
