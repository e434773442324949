"""Append-only JSON-lines files that survive a crash in the middle of a write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from k2rl.errors import RunError

T = TypeVar("T")


class JsonlWriter:
    """Appends one JSON object a line; a line is on the disk when `write` returns.

    What `path` holds is kept with `append` and dropped without.
    """

    def __init__(self, path: Path, append: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab" if append else "wb")

    def write(self, record: Any) -> None:
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path, type: type[T]) -> list[T]:
    """The records of `path`, none if there is no such file; a torn last line is left out.

    Raises:
        RunError: if a line before the last is not a record.
    """
    if not path.exists():
        return []
    records: list[T] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(msgspec.json.decode(line, type=type))
        except msgspec.DecodeError as error:
            # A crash tears only the line it was writing; no proper prefix of a JSON object decodes.
            if number < len(lines):
                raise RunError(f"{path}, line {number} is damaged: {error}") from error
    return records


def rewind_jsonl(path: Path, type: type[T], keep: Callable[[T], bool]) -> list[T]:
    """Rewrite `path` with the records to `keep`, without a torn last line, and return them.

    The file is replaced as a whole, so a crash leaves the old or the new one.
    """
    if not path.exists():
        return []
    records = [record for record in read_jsonl(path, type) if keep(record)]
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    unfinished.replace(path)
    return records
