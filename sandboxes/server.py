"""Sandboxes for other machines: an HTTP server in front of a backend (`k2rl sandbox serve`).

Whoever has the token may run code in sandboxes here and nothing else: paths of this machine and images are
only those that the server was told to lend, and a sandbox is closed when its client has not been heard of for
a lease.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from sandboxes import wire
from sandboxes.base import GIB, MIB, Backend, Sandbox, SandboxSpec, Shell
from sandboxes.errors import SandboxError, SandboxFileError, SandboxUnsupportedError

LOG = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class ServerOptions:
    """What a server lends, and to whom."""

    host: str = "127.0.0.1"
    #: 0: any that is free.
    port: int = 0
    #: What a client must show. None is for loopback only, where whoever has an account may use the server.
    token: str | None = None
    #: Sandboxes that may be open at once.
    sandboxes: int = 64
    #: Seconds after which a sandbox is closed whose client is not heard of.
    lease: float = 60.0
    #: Bytes of a request.
    body_bytes: int = 320 * MIB
    #: Memory and files that a sandbox may ask for, each.
    memory_bytes: int = 4 * GIB
    #: Files and folders of this machine that may appear in a sandbox, with all that is in them.
    paths: tuple[Path, ...] = ()
    #: Images (for bubblewrap: folders of root file systems) that may be asked for by name.
    images: tuple[str, ...] = ()
    #: Hosts that sandboxes may be allowed to reach, as `name:port`.
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.token is None and self.host not in LOOPBACK:
            raise ValueError(
                f"a sandbox server on {self.host} runs code for whoever reaches it: give it a token "
                f"(--token-file, or {wire.TOKEN_VARIABLE}), or bind it to 127.0.0.1"
            )
        if self.token is not None and len(self.token) < 16:
            raise ValueError("the sandbox server's token is shorter than 16 characters: take a random one")
        if self.sandboxes < 1 or self.lease <= 0 or self.body_bytes < 1:
            raise ValueError("sandboxes, lease and body_bytes of a sandbox server must be positive")


@dataclass
class _Lent:
    sandbox: Sandbox
    expires: float
    shells: dict[str, Shell] = field(default_factory=dict)


class SandboxServer:
    """Serves one backend. It belongs to one event loop, and closes the backend when it stops."""

    def __init__(self, backend: Backend, options: ServerOptions) -> None:
        self._backend = backend
        self._options = options
        self._lent: dict[str, _Lent] = {}
        self._opening: set[asyncio.Task[wire.Opened]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self) -> str:
        """Listen; returns the server's address.

        Raises:
            OSError: the address cannot be bound.
        """
        app = web.Application(
            client_max_size=self._options.body_bytes, middlewares=[self._guard, _report_faults]
        )
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/findings", self._findings)
        app.router.add_post("/v1/renew", self._renew)
        app.router.add_post("/v1/sandboxes", self._open)
        app.router.add_post("/v1/sandboxes/{id}", self._call)
        app.router.add_delete("/v1/sandboxes/{id}", self._close)
        # A client that goes away takes its run with it.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._options.host, self._options.port)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._sweeper = asyncio.create_task(self._sweep())
        return self.url

    async def stop(self) -> None:
        """Stop listening and close every sandbox and the backend."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        for task in self._opening:
            task.cancel()
        self._lent.clear()
        await self._backend.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who may ask at all; before a byte of the body is read."""
        token = self._options.token
        if token is None:
            # Web pages in a browser of this machine reach loopback, too: by a name of their own, or without
            # a content type that a browser would ask leave for.
            if request.url.host not in LOOPBACK:
                return _refuse(403, "this server has no token and answers to loopback's names only")
        elif request.path != "/health":
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):
                return _refuse(
                    401, f"wrong or missing token (the client takes it from {wire.TOKEN_VARIABLE})"
                )
        if request.method == "POST" and request.content_type != wire.CONTENT_TYPE:
            return _refuse(415, f"the body must be {wire.CONTENT_TYPE}")
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"ok": True, "backend": self._backend.name})

    async def _findings(self, request: web.Request) -> web.Response:
        return _answer(await self._backend.findings())

    async def _renew(self, request: web.Request) -> web.Response:
        renew = msgspec.msgpack.decode(await request.read(), type=wire.Renew)
        unknown = [id for id in renew.ids if not self._touch(id)]
        load = wire.Load(open=len(self._lent) + len(self._opening), capacity=self._options.sandboxes)
        return _answer(wire.Renewed(unknown=unknown, load=load))

    async def _open(self, request: web.Request) -> web.Response:
        spec = msgspec.msgpack.decode(await request.read(), type=SandboxSpec)
        self._check(spec)
        if len(self._lent) + len(self._opening) >= self._options.sandboxes:
            return _fault(
                wire.Fault(kind="full", message=f"all {self._options.sandboxes} sandboxes are open")
            )
        opening = asyncio.create_task(self._open_one(spec))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)
        # Shielded: if the client goes away meanwhile, nobody renews what was opened for it, and the lease
        # ends.
        return _answer(await asyncio.shield(opening))

    async def _open_one(self, spec: SandboxSpec) -> wire.Opened:
        sandbox = await self._backend.open(spec)
        id = secrets.token_urlsafe(16)
        self._lent[id] = _Lent(sandbox, time.monotonic() + self._options.lease)
        return wire.Opened(id=id, home=sandbox.home, lease=self._options.lease)

    async def _call(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if not self._touch(id):
            return _fault(_gone(id))
        call = msgspec.msgpack.decode(await request.read(), type=wire.Call)
        if id not in self._lent:  # closed while the body came in
            return _fault(_gone(id))
        answer = await _perform(call, self._lent[id])
        self._touch(id)
        return _answer(answer)

    async def _close(self, request: web.Request) -> web.Response:
        lent = self._lent.pop(request.match_info["id"], None)
        if lent is not None:
            await self._close_one(lent)
        return _answer(None)

    def _close_one(self, lent: _Lent) -> asyncio.Future[None]:
        """Close a sandbox, to the end even if nobody waits for it."""
        closing = asyncio.create_task(lent.sandbox.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return asyncio.shield(closing)

    def _touch(self, id: str) -> bool:
        """Extend a lease; whether there is such a sandbox."""
        lent = self._lent.get(id)
        if lent is not None:
            lent.expires = time.monotonic() + self._options.lease
        return lent is not None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._options.lease / 4)
            expired = [id for id, lent in self._lent.items() if lent.expires < time.monotonic()]
            for id in expired:
                LOG.warning("sandbox %s is closed: its client was not heard of", id[:6])
                try:
                    await self._close_one(self._lent.pop(id))
                except SandboxError as error:
                    LOG.warning("sandbox %s: %s", id[:6], error)

    def _check(self, spec: SandboxSpec) -> None:
        """Refuse what this server does not lend.

        Raises:
            SandboxUnsupportedError: names it.
        """
        for path in spec.read_only.values():
            real = Path(path).resolve()
            if not any(real.is_relative_to(root.resolve()) for root in self._options.paths):
                raise SandboxUnsupportedError(f"this server does not lend its {path} (--lend-path)")
        if spec.image is not None and spec.image not in self._options.images:
            raise SandboxUnsupportedError(f"this server does not offer the image {spec.image} (--lend-image)")
        for host in spec.allow_hosts:
            if host not in self._options.hosts:
                raise SandboxUnsupportedError(f"this server lets no sandbox reach {host} (--lend-host)")
        for name in ("memory_bytes", "disk_bytes"):
            if getattr(spec.limits, name) > self._options.memory_bytes:
                most = self._options.memory_bytes
                raise SandboxUnsupportedError(f"this server gives {most} {name} at most (--memory-mib)")


async def _perform(call: wire.Call, lent: _Lent) -> Any:
    """Ask the backend's sandbox what the client asked."""
    sandbox = lent.sandbox
    match call:
        case wire.Exec():
            return await sandbox.exec(
                call.argv, stdin=call.stdin, env=call.env, cwd=call.cwd, timeout=call.timeout, user=call.user
            )
        case wire.RunPython():
            return await sandbox.run_python(
                call.code, stdin=call.stdin, argv=call.argv, env=call.env, timeout=call.timeout
            )
        case wire.ReadFile():
            return await sandbox.read_file(call.path, limit=call.limit)
        case wire.WriteFile():
            return await sandbox.write_file(call.path, call.content, executable=call.executable)
        case wire.Upload():
            return await sandbox.upload(call.files)
        case wire.Snapshot():
            return await sandbox.snapshot()
        case wire.Restore():
            return await sandbox.restore(call.snapshot)
        case wire.IsAlive():
            return await sandbox.is_alive()
        case wire.OpenShell() | wire.RunInShell() | wire.CloseShell():
            return await _perform_in_shell(call, lent)


async def _perform_in_shell(call: wire.OpenShell | wire.RunInShell | wire.CloseShell, lent: _Lent) -> Any:
    if isinstance(call, wire.OpenShell):
        id = secrets.token_urlsafe(8)
        lent.shells[id] = await lent.sandbox.shell(cwd=call.cwd, env=call.env)
        return id
    if isinstance(call, wire.CloseShell):
        shell = lent.shells.pop(call.shell, None)
        return await shell.close() if shell is not None else None
    if call.shell not in lent.shells:
        raise SandboxError(f"there is no shell {call.shell!r} in this sandbox")
    shell = lent.shells[call.shell]
    result = await shell.run(call.command, timeout=call.timeout)
    return wire.Ran(result=result, alive=shell.is_alive())


@web.middleware
async def _report_faults(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as the client needs them. Bugs of ours are logged with their traceback and told as what they
    are."""
    try:
        return await handler(request)
    except (SandboxError, SandboxFileError) as error:
        return _fault(wire.fault_of(error))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return _refuse(400, f"not a request that this server knows: {error}")
    except ValueError as error:  # what no program can be called with
        return _fault(wire.Fault(kind="invalid", message=str(error)))


def _gone(id: str) -> wire.Fault:
    return wire.Fault(
        kind="closed",
        message=f"there is no sandbox {id[:6]}…: closed, its lease ended, or the server is a new one",
    )


def _answer(value: Any) -> web.Response:
    return web.Response(body=msgspec.msgpack.encode(value), content_type=wire.CONTENT_TYPE)


def _fault(fault: wire.Fault, status: int | None = None) -> web.Response:
    response = _answer(fault)
    response.set_status(wire.STATUS[fault.kind] if status is None else status)
    return response


def _refuse(status: int, message: str) -> web.Response:
    """Refuse a request for what it is; a client of ours raises `SandboxError`."""
    return _fault(wire.Fault(kind="failed", message=message), status)
