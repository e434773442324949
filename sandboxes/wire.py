"""What a sandbox server and its clients say to each other: msgpack over HTTP, typed on both sides.

`POST /v1/sandboxes` opens one (body: a `SandboxSpec`, answer: `Opened`), `POST /v1/sandboxes/<id>` asks
something of it (body: one of `Call`), `DELETE` closes it, `POST /v1/renew` keeps several from being closed
for lack of a client. What failed comes back as a `Fault` with a status of 400 or more.
"""

from __future__ import annotations

import msgspec

from k2rl.types import prepare
from sandboxes.base import ExecResult, SandboxSpec
from sandboxes.errors import (
    FileProblem,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxUnavailableError,
    SandboxUnsupportedError,
)

CONTENT_TYPE = "application/msgpack"
TOKEN_VARIABLE, SERVERS_VARIABLE = "K2RL_SANDBOX_TOKEN", "K2RL_SANDBOX_SERVERS"


class Exec(msgspec.Struct, frozen=True, tag="exec", kw_only=True):
    argv: list[str]
    stdin: bytes = b""
    env: dict[str, str] | None = None
    cwd: str | None = None
    timeout: float | None = None
    user: str | None = None


class RunPython(msgspec.Struct, frozen=True, tag="run_python", kw_only=True):
    code: str
    stdin: bytes = b""
    argv: list[str] = []
    env: dict[str, str] | None = None
    timeout: float | None = None


class OpenShell(msgspec.Struct, frozen=True, tag="open_shell", kw_only=True):
    cwd: str | None = None
    env: dict[str, str] | None = None


class RunInShell(msgspec.Struct, frozen=True, tag="run_in_shell", kw_only=True):
    shell: str
    command: str
    timeout: float | None = None


class CloseShell(msgspec.Struct, frozen=True, tag="close_shell", kw_only=True):
    shell: str


class ReadFile(msgspec.Struct, frozen=True, tag="read_file", kw_only=True):
    path: str
    limit: int | None = None


class WriteFile(msgspec.Struct, frozen=True, tag="write_file", kw_only=True):
    path: str
    content: bytes
    executable: bool = False


class Upload(msgspec.Struct, frozen=True, tag="upload", kw_only=True):
    files: dict[str, bytes]


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot", kw_only=True):
    pass


class Restore(msgspec.Struct, frozen=True, tag="restore", kw_only=True):
    snapshot: bytes


class IsAlive(msgspec.Struct, frozen=True, tag="is_alive", kw_only=True):
    pass


Call = (
    Exec
    | RunPython
    | OpenShell
    | RunInShell
    | CloseShell
    | ReadFile
    | WriteFile
    | Upload
    | Snapshot
    | Restore
    | IsAlive
)


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    home: str
    #: Seconds without a call or a renewal after which the server closes the sandbox.
    lease: float


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """An `ExecResult` of a shell, and whether the shell takes another command."""

    result: ExecResult
    alive: bool


class Renew(msgspec.Struct, frozen=True, kw_only=True):
    ids: list[str]


class Renewed(msgspec.Struct, frozen=True, kw_only=True):
    #: Those that the server does not have, or no longer.
    unknown: list[str]
    load: Load


class Load(msgspec.Struct, frozen=True, kw_only=True):
    open: int
    capacity: int


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request was not granted, so that the client raises what the backend did."""

    kind: str
    message: str
    path: str = ""
    problem: FileProblem = "io"


#: kind -> the error that a client raises. `full` is not among them: the client tries another server.
ERRORS: dict[str, type[SandboxError]] = {
    "closed": SandboxClosedError,
    "unavailable": SandboxUnavailableError,
    "unsupported": SandboxUnsupportedError,
    "failed": SandboxError,
}
STATUS = {
    "invalid": 400,
    "closed": 410,
    "unavailable": 503,
    "unsupported": 422,
    "failed": 502,
    "file": 409,
    "full": 429,
}


def fault_of(error: SandboxError | SandboxFileError) -> Fault:
    """An error of a backend as what crosses the wire."""
    if isinstance(error, SandboxFileError):
        return Fault(kind="file", message=error.detail, path=error.path, problem=error.problem)
    kind = next(kind for kind, of in ERRORS.items() if isinstance(error, of))
    return Fault(kind=kind, message=str(error))


def error_of(fault: Fault, where: str) -> SandboxError | SandboxFileError | ValueError:
    """The error that the backend raised; `where` names the server."""
    if fault.kind == "invalid":
        return ValueError(fault.message)
    if fault.kind == "file":
        return SandboxFileError(fault.path, fault.problem, fault.message)
    return ERRORS.get(fault.kind, SandboxError)(f"{fault.message} (sandbox server {where})")


prepare(SandboxSpec, Call, Opened, Ran, Renew, Renewed, Load, Fault)
