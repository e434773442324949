"""What of a run died and was started again."""

from __future__ import annotations

from pathlib import Path

import msgspec

from k2rl.tracking.jsonl import JsonlWriter, read_jsonl, rewind_jsonl

FILE = "restarts.jsonl"


class Restart(msgspec.Struct, frozen=True):
    """Something was started again."""

    #: The last step that was finished.
    step: int
    #: What had died and in which call, in a line.
    why: str


def open_restarts(run_dir: Path, resumed: bool) -> JsonlWriter:
    """For `Restart`s; those of a run that is resumed are kept."""
    if resumed:
        rewind_jsonl(run_dir / FILE, Restart, lambda restart: True)
    return JsonlWriter(run_dir / FILE, append=resumed)


def read_restarts(run_dir: Path) -> list[Restart]:
    """The restarts of a run, the oldest first."""
    return read_jsonl(run_dir / FILE, Restart)
