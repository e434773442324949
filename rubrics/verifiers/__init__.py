"""Judges that know what is right."""

from rubrics.verifiers.base import Verifier

__all__ = ["Verifier"]
