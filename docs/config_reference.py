"""Writes docs/config.md from the typed configuration: `python docs/config_reference.py [--check]`."""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from k2rl import config
from k2rl.choices import config_groups

TARGET = Path(__file__).parent / "config.md"
HEADER = """\
# Configuration

A run is composed by Hydra from one choice of each group, an optional `experiment`, and overrides on the
command line: `k2rl train experiment=quickstart optimizer=adamw rollout.group_size=16`. `k2rl train --cfg …`
prints the result. Unknown keys and impossible combinations end the command at once, with exit code 2.

This page is generated from `k2rl/config.py` by `make docs`. Defaults are the schema's; the choices under
`conf/` may set others.
"""


def main() -> int:
    page = render()
    if "--check" in sys.argv:
        return 0 if TARGET.read_text() == page else 1
    TARGET.write_text(page)
    return 0


def render() -> str:
    groups = config_groups()
    parts = [HEADER, _section("run", config.Config, "", [])]
    for field in fields(config.Config):
        default = _default(field)
        if is_dataclass(default):
            parts.append(_section(field.name, type(default), f"{field.name}.", groups.get(field.name, [])))
    parts.append(
        "## `experiment`\n\nComplete runs: " + ", ".join(f"`{name}`" for name in groups["experiment"]) + ".\n"
    )
    return "\n".join(parts)


def _section(title: str, schema: type, prefix: str, choices: list[str]) -> str:
    comments = _comments(schema)
    lines = [f"## `{title}`", ""]
    if choices:
        lines += ["Choices: " + ", ".join(f"`{choice}`" for choice in choices) + ".", ""]
    lines += ["| key | default | meaning |", "| --- | --- | --- |"]
    for field in fields(schema):
        default = _default(field)
        if not is_dataclass(default):
            lines.append(f"| `{prefix}{field.name}` | `{_yaml(default)}` | {comments[field.name]} |")
    nested = [field for field in fields(schema) if prefix and is_dataclass(_default(field))]
    for field in nested:
        rows = _section("", type(_default(field)), f"{prefix}{field.name}.", []).splitlines()
        lines += rows[4:]
    return "\n".join(lines) + "\n"


def _comments(schema: type) -> dict[str, str]:
    """The `#:` lines above each field."""
    comments: dict[str, str] = {}
    pending: list[str] = []
    for line in inspect.getsource(schema).splitlines():
        if match := re.match(r"\s*#: (.*)", line):
            pending.append(match[1])
        elif match := re.match(r"\s*(\w+):", line):
            comments[match[1]] = " ".join(pending).replace("|", "\\|")
            pending = []
    return comments


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _yaml(value: Any) -> str:
    return json.dumps(value).strip('"')


if __name__ == "__main__":
    sys.exit(main())
