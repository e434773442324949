"""Which arguments vLLM takes, without importing it: that takes many seconds and gigabytes."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from k2rl.errors import ConfigError


def check_engine_args(names: Iterable[str]) -> None:
    """Check that vLLM knows these engine arguments.

    Raises:
        ConfigError: one line, with the name that it does not know.
    """
    names = list(names)
    known = _engine_arguments() if names else set()
    for name in names:
        if known and name not in known:
            close = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"inference.engine_args.{name}: vLLM has no such engine argument{hint}")


def _engine_arguments() -> set[str]:
    """The fields of vLLM's `AsyncEngineArgs`, read from its source; empty where there is none to read."""
    spec = find_spec("vllm")
    source = Path(spec.origin).parent / "engine" / "arg_utils.py" if spec and spec.origin else None
    if source is None or not source.is_file():
        return set()
    classes = {
        node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)
    }
    return {
        line.target.id
        for name in ("EngineArgs", "AsyncEngineArgs")
        if name in classes
        for line in classes[name].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
