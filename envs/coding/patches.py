"""Unified diffs, applied exactly: no fuzz, no shell, nothing outside of the files that are given."""

from __future__ import annotations

import re
from collections.abc import Mapping

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_ESCAPE = re.compile(r'\\([0-7]{3}|["\\abfnrtv])')


class PatchError(ValueError):
    """A diff that cannot be read or does not fit the files."""


def apply_patch(files: Mapping[str, bytes], patch: str) -> dict[str, bytes | None]:
    """What a git-style diff makes of files: path -> new content, or None where one is removed.

    Raises:
        PatchError: it is none, or does not fit.
    """
    changes: dict[str, bytes | None] = {}
    lines = patch.split("\n")
    place = 0
    while place < len(lines):
        if lines[place].startswith("diff --git ") or lines[place].startswith("--- "):
            place = _file(lines, place, files, changes)
        elif lines[place].startswith("@@ "):
            raise PatchError(f"line {place + 1}: a hunk without a file")
        else:
            place += 1
    if not changes:
        raise PatchError("there is no change in it")
    return changes


def _file(lines: list[str], place: int, files: Mapping[str, bytes], changes: dict[str, bytes | None]) -> int:
    old, new, place = _header(lines, place)
    if old is None and new is None:
        return place  # a change of mode alone, or an empty file
    source = changes.get(old or "", files.get(old or ""))
    if old is not None and source is None:
        raise PatchError(f"{old}: there is no such file")
    before = (source or b"").decode("utf-8", "surrogateescape").split("\n")
    after: list[str] = []
    done = 0
    while place < len(lines) and lines[place].startswith("@@ "):
        place, done = _hunk(lines, place, before, done, after, new or str(old))
    after += before[done:]
    if old is not None and old != new:
        changes[old] = None
    if new is not None:
        changes[new] = "\n".join(after).encode("utf-8", "surrogateescape")
    return place


def _header(lines: list[str], place: int) -> tuple[str | None, str | None, int]:
    """The old and the new path of a file, None where it is not there, and the line of its first hunk."""
    old = new = None
    first, complete = place, False
    while place < len(lines) and not lines[place].startswith("@@ "):
        line = lines[place]
        of_next = line.startswith("diff --git ") or (line.startswith("--- ") and complete)
        if place > first and of_next:
            break
        if line.startswith(("rename from ", "--- ")):
            old = _path(line) if line.startswith("-") else line.removeprefix("rename from ")
        elif line.startswith(("rename to ", "+++ ")):
            complete = line.startswith("+")
            new = _path(line) if complete else line.removeprefix("rename to ")
        elif line.startswith(("GIT binary patch", "Binary files ")):
            raise PatchError("binary changes cannot be applied")
        place += 1
    return old, new, place


def _hunk(
    lines: list[str], place: int, before: list[str], done: int, after: list[str], path: str
) -> tuple[int, int]:
    """Apply one hunk; returns the next line of the patch, and how much of `before` is used."""
    header = _HUNK.match(lines[place])
    if header is None:
        raise PatchError(f"line {place + 1}: {lines[place]:.60}")
    start, old_count, _, new_count = (int(number) if number is not None else 1 for number in header.groups())
    start = start if old_count == 0 else start - 1
    if not done <= start <= len(before):
        raise PatchError(f"{path}: a hunk at line {start + 1}, where there is none")
    after += before[done:start]
    done, place = start, place + 1
    bare = {"-": False, "+": False}
    last = ""
    while place < len(lines) and (old_count > 0 or new_count > 0 or lines[place].startswith("\\")):
        sign, text = lines[place][:1], lines[place][1:]
        if sign == "\\":
            # Of the line before, which has no newline: on the old side, the new one, or both.
            bare = {side: bare[side] or last in (side, " ", "") for side in bare}
        elif sign in ("-", " ", ""):
            if done >= len(before) or before[done] != text:
                raise PatchError(f"{path}: line {done + 1} is not {text!r:.60}")
            done, old_count = done + 1, old_count - 1
        if sign in ("+", " ", ""):
            after.append(text)
            new_count -= 1
        elif sign not in ("-", "\\"):
            raise PatchError(f"line {place + 1}: {lines[place]:.60}")
        last, place = sign, place + 1
    if old_count or new_count:
        raise PatchError(f"{path}: a hunk that is cut off")
    # A text with a newline at its end has, split, an empty last line.
    if bare["+"] and not bare["-"] and before[done:] == [""]:
        done += 1
    if bare["-"] and not bare["+"]:
        after.append("")
    return place, done


def _path(line: str) -> str | None:
    """The path of a `---` or `+++` line, without its `a/` or `b/`; None for /dev/null."""
    path = line[4:].split("\t")[0].strip()
    if path.startswith('"') and path.endswith('"'):
        path = _ESCAPE.sub(lambda found: _unescaped(found[1]), path[1:-1])
        path = path.encode("latin-1", "replace").decode("utf-8", "replace")
    if path == "/dev/null":
        return None
    return path[2:] if path[:2] in ("a/", "b/") else path


def _unescaped(text: str) -> str:
    return chr(int(text, 8)) if text.isdigit() else {"n": "\n", "t": "\t"}.get(text, text)
