"""What can go wrong with a sandbox, told apart by whose fault it is.

A fault of ours (no bwrap, a daemon that is gone, a broken pipe) is a `SandboxError`: whoever judges code
gives no score for it. What the code in the sandbox did is a result (`ExecResult`) or, for files it should
have written, a `SandboxFileError`.
"""

from __future__ import annotations

from typing import Literal

FileProblem = Literal["missing", "symlink", "not_a_file", "too_large", "no_space", "denied", "io"]


class SandboxError(Exception):
    """The sandbox, not the code in it, failed: the message says what and, where it is known, how to mend
    it."""


class SandboxUnavailableError(SandboxError):
    """The backend cannot run on this machine as it is; the message says what is missing and how to get it."""


class SandboxUnsupportedError(SandboxError):
    """The backend cannot give what was asked for. It never gives something weaker instead."""


class SandboxClosedError(SandboxError):
    """The sandbox is closed, or it died; the message says of what."""


class SandboxFileError(Exception):
    """A file in the sandbox could not be read or written, for a reason that lies in the sandbox's own
    files."""

    def __init__(self, path: str, problem: FileProblem, detail: str = "") -> None:
        super().__init__(path, problem, detail)
        self.path = path
        self.problem: FileProblem = problem
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.path}: {self.problem.replace('_', ' ')}" + (f" ({self.detail})" if self.detail else "")
