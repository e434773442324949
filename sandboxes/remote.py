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
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from sandboxes import wire
from sandboxes.base import ExecResult, Finding, SandboxSpec
from sandboxes.errors import (
    SandboxClosedError,
    SandboxError,
    SandboxUnavailableError,
)

T = TypeVar("T")

CONNECT_SECONDS = 10.0
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
        urls = [urls] if isinstance(urls, str) else urls
        if not urls:
            raise SandboxUnavailableError(
                f"no sandbox server is named: start one (k2rl sandbox serve), and {wire.SERVERS_VARIABLE}="
                "http://host:port"
            )
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no address of a sandbox server: http://host:port")
        token = token if token is not None else os.environ.get(wire.TOKEN_VARIABLE)
        self._servers = [_Server(url.rstrip("/"), token) for url in dict.fromkeys(urls)]
        self._open_seconds = open_seconds

    async def open(self, spec: SandboxSpec) -> RemoteSandbox:
        """See `Backend.open`. Servers that are down or full are passed over."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._open_seconds, 0.05
        while True:
            faults = []
            for server in sorted(self._servers, key=lambda server: server.crowding):
                try:
                    return await server.open(spec)
                except _PassOverError as error:
                    faults.append(error)
            why = "; ".join(str(fault) for fault in faults)
            if not any(fault.full for fault in faults):
                raise SandboxUnavailableError(f"no sandbox server answers: {why}")
            if loop.time() + pause > deadline:
                raise SandboxError(f"no sandbox server had room within {self._open_seconds:g} s: {why}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)

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


class _PassOverError(Exception):
    """This server cannot open a sandbox now, another may."""

    def __init__(self, message: str, full: bool) -> None:
        super().__init__(message)
        self.full = full


class _Server:
    """The connection to one server: calls with deadlines, and a heartbeat that keeps its sandboxes ours."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._headers = {"Content-Type": wire.CONTENT_TYPE}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._session: aiohttp.ClientSession | None = None
        self._heart: asyncio.Task[None] | None = None
        self._load = wire.Load(open=0, capacity=1)
        #: Why it was passed over last time; None: it answered.
        self._down: str | None = None
        self._lost: str | None = None
        self._waiting: set[asyncio.Timeout] = set()
        self.sandboxes: dict[str, RemoteSandbox] = {}

    @property
    def crowding(self) -> tuple[bool, float]:
        """What orders servers by who should open the next sandbox."""
        known = max(self._load.open, len(self.sandboxes))
        return self._down is not None, known / self._load.capacity

    async def open(self, spec: SandboxSpec) -> RemoteSandbox:
        try:
            # The first sandbox of an image may have to build or load it.
            opened = await self.ask("POST", "/v1/sandboxes", spec, wire.Opened, 10 * GRACE_SECONDS)
        except _FullError as error:
            self._load = wire.Load(open=self._load.capacity, capacity=self._load.capacity)
            raise _PassOverError(str(error), full=True) from None
        except _UnreachableError as error:
            self._down = str(error)
            raise _PassOverError(str(error), full=False) from None
        self._down = None
        sandbox = RemoteSandbox(self, opened, spec)
        self.sandboxes[opened.id] = sandbox
        self._load = wire.Load(open=self._load.open + 1, capacity=self._load.capacity)
        if self._heart is None or self._heart.done():
            self._lost = None
            self._heart = asyncio.create_task(self._beat(opened.lease))
        return sandbox

    async def ask(
        self, method: str, path: str, body: Any, answer: type[T], seconds: float, *, beat: bool = False
    ) -> T:
        """One request.

        Raises:
            _UnreachableError: the server does not answer, or not in time.
            SandboxError and SandboxFileError: what the backend behind it raised, or why it refused.
        """
        session = self._session
        if session is None or session.closed:
            # Connections idle for longer than a few seconds are not used again: the server may be closing
            # them.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=10.0)
            session = aiohttp.ClientSession(headers=self._headers, connector=connector)
            self._session = session
        no_limit = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with asyncio.timeout(seconds) as deadline:
                if not beat:
                    self._waiting.add(deadline)
                try:
                    data = None if body is None else msgspec.msgpack.encode(body)
                    async with session.request(
                        method, self.url + path, data=data, timeout=no_limit, allow_redirects=False
                    ) as reply:
                        content, status = await reply.read(), reply.status
                        kind = reply.content_type
                finally:
                    self._waiting.discard(deadline)
        except TimeoutError:
            why = self._lost or f"sandbox server {self.url} did not answer within {seconds:g} s"
            raise _UnreachableError(why) from None
        except aiohttp.ClientError as error:
            raise _UnreachableError(
                f"sandbox server {self.url} is gone: {error or type(error).__name__}"
            ) from None
        return self._read(content, status, kind, answer)

    def _read(self, content: bytes, status: int, kind: str, answer: type[T]) -> T:
        try:
            if status == 200 and kind == wire.CONTENT_TYPE:
                return msgspec.msgpack.decode(content, type=answer)
            if kind == wire.CONTENT_TYPE:
                fault = msgspec.msgpack.decode(content, type=wire.Fault)
                if fault.kind == "full":
                    raise _FullError(f"{self.url}: {fault.message}")
                raise wire.error_of(fault, self.url)
        except msgspec.MsgspecError as error:
            raise SandboxError(f"sandbox server {self.url} sent what no such server sends: {error}") from None
        if status == 413:
            raise SandboxError(f"sandbox server {self.url}: the request is larger than it takes (--body-mib)")
        raise SandboxError(f"what answers at {self.url} is no sandbox server: HTTP status {status}, {kind}")

    async def _beat(self, lease: float) -> None:
        """Renew the leases, until there is nothing left to renew or the server is lost."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while self.sandboxes:
            await asyncio.sleep(lease / 4)
            renew = wire.Renew(ids=list(self.sandboxes))
            try:
                renewed = await self.ask("POST", "/v1/renew", renew, wire.Renewed, lease / 2, beat=True)
            except SandboxError as error:
                if loop.time() - heard > lease:
                    self._lose(f"sandbox server {self.url} was not heard of for {lease:g} s: {error}")
                continue
            heard, self._load = loop.time(), renewed.load
            for id in renewed.unknown:
                if id in self.sandboxes:
                    self.sandboxes[id].lost(f"sandbox server {self.url} has closed it or is a new one")

    def _lose(self, why: str) -> None:
        """The server's sandboxes are gone: fail what waits for them."""
        self._lost = self._down = why
        now = asyncio.get_running_loop().time()
        for deadline in self._waiting:
            deadline.reschedule(now)
        for sandbox in list(self.sandboxes.values()):
            sandbox.lost(why)

    async def close(self) -> None:
        await asyncio.gather(*(sandbox.close() for sandbox in list(self.sandboxes.values())))
        if self._heart is not None:
            self._heart.cancel()
        if self._session is not None:
            await self._session.close()


class _UnreachableError(SandboxError):
    """The server did not answer."""


class _FullError(SandboxError):
    """The server has as many sandboxes as it can."""


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
        self._server.sandboxes.pop(self.id, None)

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
