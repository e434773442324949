"""A sandbox of the bubblewrap backend: requests to its agent, and what comes back."""

from __future__ import annotations

import asyncio
import marshal
import math
import os
import resource
import socket
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from sandboxes.base import ExecResult, Limits, SandboxSpec
from sandboxes.bubblewrap import agent, seccomp
from sandboxes.bubblewrap.cgroups import oom_kills
from sandboxes.bubblewrap.command import ENVIRONMENT, ETC, USER
from sandboxes.bubblewrap.runs import Run, pipes, sealed
from sandboxes.bubblewrap.shell import BubblewrapShell
from sandboxes.errors import (
    FileProblem,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxUnsupportedError,
)

R = TypeVar("R", bound=Run)

#: Requests above this travel in a file: a packet must fit the socket's buffer.
LARGEST_PACKET = 60_000
#: Seconds that the agent may take to end a run that was killed, before the sandbox itself is.
PATIENCE = 10.0
#: Seconds between two looks at the memory of the tree, where no control group bounds it.
WATCH = 0.05
#: Seconds for what an agent does by itself.
AGENT_SECONDS = 60.0
#: Processes of the sandbox's own beside those that are counted: bubblewrap, the agent, parents of runs.
OWN_PROCESSES = 8


class Keeper(Protocol):
    """What started a sandbox and can end it: `KeeperClient`, or a docker container."""

    #: Whom sandboxes run as, if not as this process.
    uid: int | None
    #: Why it is of no use any more; empty as long as it is.
    dead: str

    async def close(self, number: int) -> None: ...

    def kill(self, number: int) -> None: ...

    async def usage(self, number: int) -> int: ...


class BubblewrapSandbox:
    """See `sandboxes.base.Sandbox`. Made by `BubblewrapBackend.open`."""

    home = agent.HOME
    AGENT_SECONDS = AGENT_SECONDS

    def __init__(
        self,
        id: str,
        spec: SandboxSpec,
        connection: socket.socket,
        keeper: Keeper,
        number: int,
        events: str,
        turns: asyncio.Semaphore,
        forget: Callable[[int], object],
    ) -> None:
        self.id = id
        self.spec = spec
        self._connection = connection
        self._keeper = keeper
        self._number = number
        self._events = Path(events) if events else None
        self._turns = turns
        self._forget = forget
        self._alone = asyncio.Lock()
        self._runs: dict[int, Run] = {}
        self._runs_so_far = 0
        self._pongs: list[asyncio.Future[None]] = []
        #: Why nothing can be run any more.
        self._dead = ""
        self._deaf = False
        self._closing: asyncio.Future[None] | None = None
        self._env = {**ENVIRONMENT, **spec.env}
        asyncio.get_running_loop().add_reader(connection, self._receive)

    @property
    def has_cgroup(self) -> bool:
        return self._events is not None

    # ------------------------------------------------------------------------------------------ runs

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
        if user is not None:
            raise SandboxUnsupportedError(f"bubblewrap sandboxes have one user; there is no {user!r}")
        return await self._in_turn("exec", self.program(argv, cwd, env), stdin, timeout)

    async def run_python(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        argv: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        request = {
            "code": code,
            "argv": checked(argv),
            "cwd": self.home,
            "env": {**self.spec.env, **checked_env(env)},
        }
        return await self._in_turn("python", request, stdin, timeout)

    async def shell(self, *, cwd: str | None = None, env: Mapping[str, str] | None = None) -> BubblewrapShell:
        if self.spec.ephemeral:
            raise SandboxUnsupportedError(
                "an ephemeral sandbox keeps nothing from one run to the next: no shell"
            )
        return await BubblewrapShell.start(self, cwd, env)

    async def _in_turn(
        self, kind: str, request: dict[str, Any], stdin: bytes, timeout: float | None
    ) -> ExecResult:
        seconds = self.spec.limits.wall_seconds if timeout is None else timeout
        if self.spec.ephemeral:
            async with self._alone, self._turns:
                return await self._run(kind, request, stdin, seconds)
        async with self._turns:
            return await self._run(kind, request, stdin, seconds)

    async def _run(
        self, kind: str, request: dict[str, Any], stdin: bytes, timeout: float, output: int | None = None
    ) -> ExecResult:
        """One run from its request to its result."""
        kills = self.oom_kills()
        run = self.start(kind, request, stdin, output or self.spec.limits.output_bytes, Run)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout, run.end, "timed_out")
        watch = None if self._events else asyncio.ensure_future(self.watch(run))
        try:
            code, cpu = await asyncio.shield(run.done)
        except asyncio.CancelledError:
            run.end("killed")
            await asyncio.wait((run.done,))  # whoever is next must not meet what is being killed
            raise
        finally:
            timer.cancel()
            if watch is not None:
                watch.cancel()
        out_of_memory = code != 0 and self.oom_kills() > kills
        return run.result(code, cpu, self.spec.limits, out_of_memory)

    def program(self, argv: Sequence[str], cwd: str | None, env: Mapping[str, str] | None) -> dict[str, Any]:
        """The request to run a program.

        Raises:
            ValueError: no program could be called like that.
        """
        if not argv:
            raise ValueError("argv is empty: there is no program to run")
        checked([cwd or ""])
        where = os.path.join(self.home, cwd or "")  # noqa: PTH118 - a path in the sandbox
        return {"argv": checked(argv), "cwd": where, "env": {**self._env, **checked_env(env)}}

    def start(self, kind: str, request: dict[str, Any], stdin: bytes | int, output: int, of: type[R]) -> R:
        """Begin a run; `stdin` is content, or a descriptor that is closed here."""
        try:
            passed = [stdin] if isinstance(stdin, int) else [sealed("stdin", stdin)] if stdin else []
        except OSError as error:
            raise SandboxError(f"sandbox {self.id}: no file for a run's input: {error.strerror}") from error
        if self._dead:
            for descriptor in passed:
                os.close(descriptor)
            raise SandboxClosedError(f"sandbox {self.id} {self._dead}")
        self._runs_so_far += 1
        number = self._runs_so_far
        run = of(number, output, self._kill)
        try:
            (stdout, out), (stderr, err) = pipes(2)
        except OSError as error:
            for descriptor in passed:
                os.close(descriptor)
            raise SandboxError(f"sandbox {self.id}: no pipe for a run's output: {error.strerror}") from error
        run.listen(stdout, stderr)
        if self._keeper.uid is not None:  # so that /dev/stdout can be opened, which asks for the pipe's owner
            os.fchown(out, self._keeper.uid, self._keeper.uid)
            os.fchown(err, self._keeper.uid, self._keeper.uid)
        passed += [out, err]
        self._runs[number] = run
        try:
            self._send(kind, number, request, passed)
        except BaseException:
            del self._runs[number]
            run.close()
            raise
        finally:
            for descriptor in passed:
                os.close(descriptor)
        return run

    def _send(self, kind: str, number: int, request: Any, descriptors: Sequence[int] = ()) -> None:
        message = marshal.dumps((kind, number, request), 2)
        large = -1
        if len(message) > LARGEST_PACKET:
            large = sealed("request", message)
            message, descriptors = marshal.dumps(("large", number, None), 2), [*descriptors, large]
        try:
            socket.send_fds(self._connection, [message], list(descriptors))
        except BlockingIOError:
            raise SandboxError(f"sandbox {self.id} takes no more requests: its agent hangs") from None
        except OSError as error:
            raise SandboxClosedError(f"sandbox {self.id} is gone: {error.strerror}") from error
        finally:
            if large >= 0:
                os.close(large)

    def interrupt(self, number: int, since: float) -> None:
        """Kill what a shell has started since then (seconds of CLOCK_BOOTTIME)."""
        with suppress(SandboxError):  # the shell is killed if this brings no answer
            self._send("interrupt", number, since)

    def _kill(self, number: int) -> None:
        with suppress(SandboxError):  # what cannot be told any more is killed with the sandbox
            self._send("kill", number, None)
        asyncio.get_running_loop().call_later(PATIENCE, self._kill_sandbox_of, number)

    def _kill_sandbox_of(self, number: int) -> None:
        if number in self._runs:
            self._keeper.kill(self._number)

    def oom_kills(self) -> int:
        if self._events is None:
            return 0
        try:
            return oom_kills(self._events)
        except OSError:  # the group went with its sandbox
            return 0

    async def watch(self, run: Run) -> None:
        """Measure the tree's memory while a run lasts, where no control group bounds it."""
        with suppress(SandboxError):  # the keeper is gone, and the run with it
            while True:
                await asyncio.sleep(WATCH)
                if await self._keeper.usage(self._number) > self.spec.limits.memory_bytes:
                    run.end("out_of_memory")
                    return

    # ------------------------------------------------------------------------------------------ messages

    def _receive(self) -> None:
        try:
            message = self._connection.recv(1024)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._died()
        elif message == agent.PONG:
            if self._pongs:
                answer = self._pongs.pop(0)
                if not answer.done():
                    answer.set_result(None)
        elif message.startswith(agent.FAULT):
            number, text = struct.unpack("<I", message[5:9])[0], message[9:].decode("utf-8", "replace")
            if run := self._runs.pop(number, None):
                run.fail(SandboxError(f"sandbox {self.id}: a run could not be set up: {text}"))
        elif len(message) != agent.DONE.size:  # not our agent's words
            self._dead = self._dead or "said what it cannot say, and was killed"
            self._keeper.kill(self._number)
        else:
            number, code, cpu = agent.DONE.unpack(message)
            if run := self._runs.pop(number, None):
                run.finish(code, cpu)

    def _died(self) -> None:
        """Its agent has ended, and with it every process of the sandbox."""
        if self._deaf:
            return
        self._deaf = True
        asyncio.get_running_loop().remove_reader(self._connection)
        self._connection.close()
        self._dead = self._dead or "was killed"
        for answer in self._pongs:
            if not answer.done():
                answer.set_exception(SandboxClosedError(f"sandbox {self.id} {self._dead}"))
        runs, self._runs = list(self._runs.values()), {}
        for run in runs:
            if self._keeper.dead:
                run.fail(SandboxError(f"sandbox {self.id}: {self._keeper.dead}"))
            else:
                run.finish(-9, 0)

    async def is_alive(self) -> bool:
        if self._dead:
            return False
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(answer)
        try:
            self._send("ping", 0, None)
            await asyncio.wait_for(answer, PATIENCE)
        except (SandboxError, TimeoutError):
            return False
        return True

    # ------------------------------------------------------------------------------------------ files

    async def read_file(self, path: str, *, limit: int | None = None) -> bytes:
        most = self.spec.limits.file_bytes if limit is None else limit
        return await self._file("read", path, [path, most], output=most + 4096)

    async def write_file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        await self._file("write", path, [path, executable], content)

    async def upload(self, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            await self.write_file(path, content)

    async def snapshot(self) -> bytes:
        # An archive has headers and padding beside the files' content.
        limits = self.spec.limits
        return await self._file("snapshot", self.home, [], output=limits.disk_bytes + 2048 * limits.inodes)

    async def restore(self, snapshot: bytes) -> None:
        try:
            await self._file("restore", self.home, [], snapshot)
        except SandboxFileError as error:
            raise SandboxError(f"sandbox {self.id}: not restored: {error}") from error

    async def _file(
        self, kind: str, path: str, argv: list[Any], stdin: bytes = b"", output: int | None = None
    ) -> bytes:
        checked([path])
        request = {"argv": argv, "cwd": self.home}
        result = await self._run(kind, request, stdin, AGENT_SECONDS, output)
        if result.ok:
            return result.stdout
        index = result.exit_code - agent.FIRST_PROBLEM
        if result.ended == "exited" and 0 <= index < len(agent.PROBLEMS):
            problem: FileProblem = agent.PROBLEMS[index]
            raise SandboxFileError(path, problem, result.error_text)
        if result.ended == "exited" and result.exit_code == agent.CANNOT_START:
            raise SandboxFileError(path, "io", result.error_text.strip())
        if self._dead:
            raise SandboxClosedError(f"sandbox {self.id} {self._dead}")
        raise SandboxError(f"sandbox {self.id}: {kind} of {path}: {result.ended} {result.exit_code}")

    # ------------------------------------------------------------------------------------------ the end

    async def close(self) -> None:
        if self._closing is not None:
            await asyncio.shield(self._closing)
            return
        self._closing = asyncio.get_running_loop().create_future()
        self._dead = self._dead or "is closed"
        try:
            self._died()
            await self._keeper.close(self._number)
        finally:
            self._forget(self._number)
            self._closing.set_result(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def agent_settings(spec: SandboxSpec, controllers: Collection[str], finished: bool = False) -> bytes:
    """The first packet an agent reads; `controllers` are those of the sandbox's own control group."""
    limits = spec.limits
    return marshal.dumps(
        {
            "compile": False,
            "finished": finished,
            "disk_bytes": limits.disk_bytes,
            "inodes": limits.inodes,
            "files": ETC,
            "uid_map": f"{USER} 0 1".encode(),
            "filter": seccomp.program(),
            "preload": tuple(spec.preload),
            "ephemeral": spec.ephemeral,
            "rlimits": tuple(rlimits(limits, controllers)),
        },
        2,
    )


def rlimits(limits: Limits, controllers: Collection[str]) -> list[tuple[int, int]]:
    """What each process is bound to by itself.

    Without a control group a look at the tree every now and then bounds its memory; twice as much for one
    process is what it cannot pass between two looks. Where a group counts processes, RLIMIT_NPROC must not:
    it may count all that one user runs on this machine, which for containers is all sandboxes together."""
    bounds = [
        (resource.RLIMIT_CPU, math.ceil(limits.cpu_seconds)),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 1 << 16),
        (12, 0),  # RLIMIT_MSGQUEUE, which the module does not name
    ]
    if "pids" not in controllers:
        bounds.append((resource.RLIMIT_NPROC, limits.pids + OWN_PROCESSES))
    if "memory" not in controllers:
        bounds.append((resource.RLIMIT_DATA, 2 * limits.memory_bytes))
    return bounds


def checked(words: Sequence[str]) -> list[str]:
    """Words that can be passed to a program.

    Raises:
        ValueError: one holds a NUL, or cannot be encoded.
    """
    for word in words:
        if "\0" in word:
            raise ValueError(f"{word[:40]!r} holds a NUL character")
        os.fsencode(word)
    return list(words)


def checked_env(env: Mapping[str, str] | None) -> dict[str, str]:
    variables = dict(env or {})
    checked([*variables, *variables.values()])
    if wrong := [name for name in variables if not name or "=" in name]:
        raise ValueError(f"{wrong[0]!r} is not a variable's name")
    return variables
