"""The one protocol of every sandbox: what may be asked for, what comes back, and what is promised.

    async with await backend.open(SandboxSpec(limits=Limits(wall_seconds=5))) as sandbox:
        await sandbox.write_file("main.py", b"print(input())")
        result = await sandbox.exec(["python3", "main.py"], stdin=b"hello")

Promises that the conformance tests hold every backend to (tests/sandboxes/test_conformance.py):

- Code in a sandbox reaches nothing outside of it: no file, process, network, kernel key or terminal of the
  host, and no host but those that its spec allows.
- Every call ends: at its deadline, or because the sandbox died, which is an error or `killed` and never
  silence.
- What an `exec` started ends with it, however far it forked. A shell's background jobs live until the shell
  ends.
- A fault of ours raises `SandboxError`; what the code did is an `ExecResult` (see `sandboxes.errors`).
- A limit or a feature that a backend does not have raises `SandboxUnsupportedError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from sandboxes.hosts import AllowedHosts

KIB, MIB, GIB = 1024, 1024**2, 1024**3

Ended = Literal["exited", "timed_out", "out_of_memory", "output_limit", "killed"]
"""Why a run ended. `exited`: by itself, with a status or by a signal of its own doing (a crash). The next
three: by a limit. `killed`: by SIGKILL from anybody but our limits, or since the sandbox was closed or
killed under it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What code may use. The first group bounds each run, the second the sandbox as a whole."""

    #: Seconds of real time a run may take; `exec(timeout=...)` overrides it.
    wall_seconds: float = 10.0
    #: Seconds of CPU time of each process (that of the whole tree is bounded by real time and cores).
    cpu_seconds: float = 10.0
    #: Bytes of stdout and stderr together. They are counted while they stream: a run that passes it is
    #: ended, and its result holds the first so many bytes.
    output_bytes: int = 10 * MIB
    #: Open files of each process.
    open_files: int = 256

    #: Memory of all processes together, with the files that the sandbox holds in memory.
    memory_bytes: int = 512 * MIB
    #: Processes and threads at once.
    pids: int = 64
    #: The largest file that may be written, and that `read_file` returns.
    file_bytes: int = 64 * MIB
    #: All files in the sandbox's writable places together.
    disk_bytes: int = 256 * MIB
    #: Files and folders in the sandbox's writable places together.
    inodes: int = 65536
    #: Bytes to and from `allow_hosts`.
    network_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < 2**50:
                raise ValueError(f"limit {name} must be positive and finite, not {getattr(self, name)}")


class SandboxSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to open."""

    limits: Limits = Limits()
    #: Where the system's files come from. None: the backend's default (bubblewrap: the host's /usr,
    #: read-only). bubblewrap: the folder of a root file system; docker: the name of an image.
    image: str | None = None
    #: Folders or files of the host that appear read-only: path in the sandbox -> path on the host.
    read_only: dict[str, str] = {}
    #: Symbolic links for code that insists on a path: path -> where it leads in the writable places, such as
    #: {"/app": "/work"}. docker has none: make them in the image.
    links: dict[str, str] = {}
    #: Variables of every run, on top of PATH, HOME, LANG and TMPDIR. Nothing of the host's environment is
    #: passed on.
    env: dict[str, str] = {}
    #: Hosts that may be reached, through a proxy that every run finds in its variables (`sandboxes.proxy`):
    #: `name:port`, `name` (ports 80 and 443), `address:port`, or `name:port=address` for what is not public.
    #: Empty: there is no network at all.
    allow_hosts: tuple[str, ...] = ()
    #: Nothing survives a run: after each, its files, processes and IPC objects are gone. Runs take turns.
    ephemeral: bool = False
    #: Modules that `run_python` finds imported already.
    preload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        AllowedHosts.read(self.allow_hosts)
        if self.allow_hosts and self.ephemeral:
            raise ValueError("an ephemeral sandbox has no allow_hosts: what a run did would survive it there")


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run."""

    #: The exit status (0 to 255), or minus the signal's number. 127: no such program, 126: it could not be
    #: started.
    exit_code: int
    #: As they were written, binary or not, up to `Limits.output_bytes` together.
    stdout: bytes
    stderr: bytes
    #: Seconds of real time.
    duration: float
    ended: Ended

    @property
    def ok(self) -> bool:
        return self.ended == "exited" and self.exit_code == 0

    @property
    def text(self) -> str:
        """stdout as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self) -> str:
        """stderr as text; bytes that are not UTF-8 become U+FFFD."""
        return self.stderr.decode("utf-8", "replace")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that `k2rl sandbox doctor` found out."""

    #: What was looked at: "memory of the tree".
    what: str
    #: good: as strong as it gets. limited: works, weaker than it could. missing: the backend does not work.
    state: Literal["good", "limited", "missing"]
    #: What is so: "cgroup v1".
    detail: str
    #: How to get more, where that is known.
    mend: str = ""


class Shell(Protocol):
    """A shell that keeps its folder, variables and background jobs from one command to the next."""

    async def run(self, command: str, *, timeout: float | None = None) -> ExecResult:
        """Run a line or a script of commands; stderr is part of stdout, in order.

        A command that takes too long is ended with its children (`timed_out`); the shell lives on if it was
        not the shell itself that hung. Where it did not, or said `exit`, `is_alive()` is false afterwards.

        Raises:
            SandboxClosedError: the shell or its sandbox has ended.
            SandboxError: the sandbox failed.
        """
        ...

    def is_alive(self) -> bool:
        """Whether another command can be run."""
        ...

    async def close(self) -> None:
        """End the shell and everything it started. Closing twice is fine."""
        ...


class Sandbox(Protocol):
    """An open sandbox. Relative paths are relative to `home`, a writable folder that is empty at first."""

    id: str
    spec: SandboxSpec
    #: The absolute path, in the sandbox, where runs start and relative paths begin.
    home: str

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """Run a program and wait for its end, and for that of everything it started.

        Args:
            argv: the program, looked up in PATH, and its arguments.
            stdin: what it can read; after that, end of file.
            env: variables on top of the spec's.
            cwd: where it starts; `home` by default.
            timeout: seconds of real time; `Limits.wall_seconds` by default.
            user: whom it runs as; None is the sandbox's unprivileged user, the only one that every backend
                has.

        Raises:
            SandboxUnsupportedError: the backend has no such user.
            SandboxClosedError: the sandbox has ended before the run began.
            SandboxError: the sandbox failed.
        """
        ...

    async def run_python(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        argv: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        """Run Python source as `__main__`, as `python3 -I -c` would, in a process of its own.

        Args:
            code: the source; a syntax error is exit code 1 and a traceback, like any other exception.
            argv: `sys.argv[1:]`.
        """
        ...

    async def shell(self, *, cwd: str | None = None, env: Mapping[str, str] | None = None) -> Shell:
        """Start a shell (bash, or sh where there is none).

        Raises:
            SandboxUnsupportedError: the sandbox is ephemeral, or has no shell.
        """
        ...

    async def read_file(self, path: str, *, limit: int | None = None) -> bytes:
        """A regular file's content. No symlink is followed, in no component of the path, whoever swaps it
        when.

        Args:
            limit: most bytes; `Limits.file_bytes` by default.

        Raises:
            SandboxFileError: it is missing, a symlink, no regular file, too large, or not readable.
        """
        ...

    async def write_file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """Write a file, replacing what is there; folders are made as needed, and no symlink is followed.

        Raises:
            SandboxFileError: a component is a symlink or no folder, there is no space, or it may not be
                written.
        """
        ...

    async def upload(self, files: Mapping[str, bytes]) -> None:
        """`write_file` for many at once: path -> content."""
        ...

    async def snapshot(self) -> bytes:
        """The files of the writable places, as something `restore` takes in any sandbox of the same backend.

        Raises:
            SandboxUnsupportedError: the backend cannot.
        """
        ...

    async def restore(self, snapshot: bytes) -> None:
        """Make the writable places what they were at `snapshot`; what was written since is gone.

        Raises:
            SandboxUnsupportedError: the backend cannot.
            SandboxError: this is not a snapshot of this backend.
        """
        ...

    async def is_alive(self) -> bool:
        """Whether the sandbox answers. Never raises."""
        ...

    async def close(self) -> None:
        """End everything in the sandbox and remove what it took on the host. Closing twice is fine."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """Where sandboxes come from. It belongs to one event loop."""

    name: str

    async def open(self, spec: SandboxSpec) -> Sandbox:
        """Open a sandbox.

        Raises:
            SandboxUnavailableError: this machine cannot, and how to change that.
            SandboxUnsupportedError: the spec asks for what this backend cannot enforce.
            SandboxError: it failed.
        """
        ...

    async def findings(self) -> list[Finding]:
        """What this backend can and cannot do on this machine. Never raises a `SandboxError`."""
        ...

    async def close(self) -> None:
        """Close every sandbox that is still open, and what the backend keeps running."""
        ...
