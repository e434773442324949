"""Judges on the real bubblewrap."""

from tests.judges import backend, judge, loop

__all__ = ["backend", "judge", "loop"]
