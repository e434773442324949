"""Sandboxes on other machines: the client of `k2rl sandbox serve`, as a backend like the others.

With several servers, a sandbox is opened on the one that has most room. A server that no longer answers fails
what runs on it, by name, and is left out until it answers again; nothing moves to another server by itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

import msgspec

from sandboxes import wire
from sandboxes.base import ExecResult, Finding, SandboxSpec
from sandboxes.borrowing import CONNECT_SECONDS, Lender, borrow_anywhere, checked_urls
from sandboxes.errors import (
    SandboxClosedError,
    SandboxError,
    SandboxUnavailableError,
)

T = TypeVar("T")

GRACE_SECONDS = 30.0
"""What a call may take on top of the run that it asks for: the way there and back, and a busy server."""


class RemoteBackend:
    """Sandboxes of one server or several. It belongs to one event loop."""

    name = "remote"

    def __init__(
        self,
        urls: Sequence[str] | str | None = None,
        *,
        token: str | None = None,
        open_seconds: float = 120.0,
    ) -> None:
        """
        Args:
            urls: where the servers are: `http://node1:8020`; by default those that the variable
                K2RL_SANDBOX_SERVERS lists, with spaces between them.
            token: what they ask for; by default the variable K2RL_SANDBOX_TOKEN.
            open_seconds: how long `open` waits for room when all servers are full.

        Raises:
            ValueError: this is no address of a server.
            SandboxUnavailableError: none is given.
        """
        if urls is None:
            urls = os.environ.get(wire.SERVERS_VARIABLE, "").split()
        urls = checked_urls(urls, "a sandbox server")
        if not urls:
            raise SandboxUnavailableError(
                f"no sandbox server is named: start one (k2rl sandbox serve), and {wire.SERVERS_VARIABLE}="
                "http://host:port"
            )
        token = token if token is not None else os.environ.get(wire.TOKEN_VARIABLE)
        self._servers = [_Server(url, token) for url in urls]
        self._open_seconds = open_seconds

    async def open(self, spec: SandboxSpec) -> RemoteSandbox:
        """See `Backend.open`. Servers that are down or full are passed over."""
        return await borrow_anywhere(
            self._servers,
            lambda server: server.open(spec),
            self._open_seconds,
            SandboxError,
            SandboxUnavailableError,
        )

    async def findings(self) -> list[Finding]:
        """What each server says of its backend."""
        found = []
        for server in self._servers:
            try:
                answer = await server.ask("GET", "/v1/findings", None, list[Finding], CONNECT_SECONDS)
            except SandboxError as error:
                found.append(Finding(what=server.url, state="missing", detail=str(error)))
            else:
                found += [msgspec.structs.replace(one, what=f"{server.url}: {one.what}") for one in answer]
        return found

    async def close(self) -> None:
        """Close every sandbox that is still open here."""
        await asyncio.gather(*(server.close() for server in self._servers))


class _UnreachableError(SandboxError):
    """The server did not answer."""


class _FullError(SandboxError):
    """The server has as many sandboxes as it can."""


class _Server(Lender["RemoteSandbox"]):
    """The connection to one server."""

    noun = "sandbox server"
    error, unreachable, full = SandboxError, _UnreachableError, _FullError

    def error_of(self, fault: wire.Fault) -> Exception:
        return wire.error_of(fault, self.url)

    async def open(self, spec: SandboxSpec) -> RemoteSandbox:
        # The first sandbox of an image may have to build or load it.
        asking = self.ask("POST", "/v1/sandboxes", spec, wire.Opened, 10 * GRACE_SECONDS)
        return await self.borrow(
            asking, lambda opened: (opened.id, RemoteSandbox(self, opened, spec), opened.lease)
        )


class RemoteSandbox:
    """A sandbox on a server. See `Sandbox`; what its backend cannot do, this cannot either."""

    def __init__(self, server: _Server, opened: wire.Opened, spec: SandboxSpec) -> None:
        self.id = opened.id
        self.spec = spec
        self.home = opened.home
        self._server = server
        self._ended: str | None = None

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
        call = wire.Exec(argv=list(argv), stdin=stdin, env=_plain(env), cwd=cwd, timeout=timeout, user=user)
        return await self.ask(call, ExecResult, self.run_seconds(timeout))

    async def run_python(
        self,
        code: str,
        *,
        stdin: bytes = b"",
        argv: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> ExecResult:
        call = wire.RunPython(code=code, stdin=stdin, argv=list(argv), env=_plain(env), timeout=timeout)
        return await self.ask(call, ExecResult, self.run_seconds(timeout))

    async def shell(self, *, cwd: str | None = None, env: Mapping[str, str] | None = None) -> RemoteShell:
        id = await self.ask(wire.OpenShell(cwd=cwd, env=_plain(env)), str, GRACE_SECONDS)
        return RemoteShell(self, id)

    async def read_file(self, path: str, *, limit: int | None = None) -> bytes:
        return await self.ask(wire.ReadFile(path=path, limit=limit), bytes, 2 * GRACE_SECONDS)

    async def write_file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        call = wire.WriteFile(path=path, content=content, executable=executable)
        await self.ask(call, type(None), 2 * GRACE_SECONDS)

    async def upload(self, files: Mapping[str, bytes]) -> None:
        await self.ask(wire.Upload(files=dict(files)), type(None), 4 * GRACE_SECONDS)

    async def snapshot(self) -> bytes:
        return await self.ask(wire.Snapshot(), bytes, 4 * GRACE_SECONDS)

    async def restore(self, snapshot: bytes) -> None:
        await self.ask(wire.Restore(snapshot=snapshot), type(None), 4 * GRACE_SECONDS)

    async def is_alive(self) -> bool:
        try:
            return await self.ask(wire.IsAlive(), bool, GRACE_SECONDS)
        except SandboxError:
            return False

    async def close(self) -> None:
        """See `Sandbox.close`. Where the server does not answer, the end of the lease closes it there."""
        if self._ended is None:
            self.lost("it was closed")
            with suppress(SandboxError):
                await self._server.ask("DELETE", f"/v1/sandboxes/{self.id}", None, type(None), GRACE_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def lost(self, why: str) -> None:
        """No more calls: it is gone."""
        self._ended = why
        self._server.given_back(self.id)

    def run_seconds(self, timeout: float | None) -> float:
        """How long to wait for the result of a run that may take `timeout` seconds."""
        return (self.spec.limits.wall_seconds if timeout is None else timeout) + GRACE_SECONDS

    async def ask(self, call: wire.Call, answer: type[T], seconds: float) -> T:
        if self._ended is not None:
            raise SandboxClosedError(f"sandbox {self.id[:6]}…: {self._ended}")
        try:
            return await self._server.ask("POST", f"/v1/sandboxes/{self.id}", call, answer, seconds)
        except SandboxClosedError as error:
            self.lost(str(error))
            raise


class RemoteShell:
    """A shell in a remote sandbox. See `Shell`."""

    def __init__(self, sandbox: RemoteSandbox, id: str) -> None:
        self._sandbox = sandbox
        self._id = id
        self._alive = True

    async def run(self, command: str, *, timeout: float | None = None) -> ExecResult:
        if not self._alive:
            raise SandboxClosedError("the shell has ended")
        call = wire.RunInShell(shell=self._id, command=command, timeout=timeout)
        try:
            ran = await self._sandbox.ask(call, wire.Ran, self._sandbox.run_seconds(timeout))
        except SandboxClosedError:
            self._alive = False
            raise
        self._alive = ran.alive
        return ran.result

    def is_alive(self) -> bool:
        return self._alive

    async def close(self) -> None:
        """See `Shell.close`. A sandbox that is gone took its shells with it."""
        if self._alive:
            self._alive = False
            with suppress(SandboxError):
                await self._sandbox.ask(wire.CloseShell(shell=self._id), type(None), GRACE_SECONDS)


def _plain(env: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if env is None else dict(env)
