"""Sandboxes for other machines: an HTTP server in front of a backend (`k2rl sandbox serve`).

Whoever has the token may run code in sandboxes here and nothing else: paths of this machine and images are
only those that the server was told to lend.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from aiohttp import web

from sandboxes import wire
from sandboxes.base import GIB, Backend, Sandbox, SandboxSpec, Shell
from sandboxes.errors import SandboxError, SandboxFileError, SandboxUnsupportedError
from sandboxes.lending import LendingOptions, LendingServer, answer

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions(LendingOptions):
    """What a server lends, and to whom."""

    what: ClassVar[str] = "a sandbox server"
    does: ClassVar[str] = "runs code for"
    token_variable: ClassVar[str] = wire.TOKEN_VARIABLE

    #: Memory and files that a sandbox may ask for, each.
    memory_bytes: int = 4 * GIB
    #: Files and folders of this machine that may appear in a sandbox, with all that is in them.
    paths: tuple[Path, ...] = ()
    #: Images (for bubblewrap: folders of root file systems) that may be asked for by name.
    images: tuple[str, ...] = ()
    #: Entries of `SandboxSpec.allow_hosts` that may be asked for, spelled as they are here.
    hosts: tuple[str, ...] = ()


@dataclass
class _Lent:
    sandbox: Sandbox
    shells: dict[str, Shell] = field(default_factory=dict)


class SandboxServer(LendingServer[_Lent]):
    """Serves one backend. It belongs to one event loop, and closes the backend when it stops."""

    noun, nouns = "sandbox", "sandboxes"

    def __init__(self, backend: Backend, options: ServerOptions) -> None:
        super().__init__(options)
        self._backend = backend
        self._options = options

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/findings", self._findings)
        router.add_post("/v1/sandboxes", self._open)
        router.add_post("/v1/sandboxes/{id}", self._call)
        router.add_delete("/v1/sandboxes/{id}", self._close)

    async def stop(self) -> None:
        """Stop listening and close every sandbox and the backend."""
        await super().stop()
        self._lent.clear()
        await self._backend.close()

    async def close_thing(self, thing: _Lent) -> None:
        try:
            await thing.sandbox.close()
        except SandboxError as error:
            LOG.warning("closing a sandbox: %s", error)

    def health(self) -> dict[str, Any]:
        return {"backend": self._backend.name}

    def fault_of(self, error: Exception) -> wire.Fault | None:
        if isinstance(error, (SandboxError, SandboxFileError)):
            return wire.fault_of(error)
        # What no program can be called with.
        return wire.Fault(kind="invalid", message=str(error)) if isinstance(error, ValueError) else None

    async def _findings(self, request: web.Request) -> web.Response:
        return answer(await self._backend.findings())

    async def _open(self, request: web.Request) -> web.Response:
        spec = msgspec.msgpack.decode(await request.read(), type=SandboxSpec)
        self._check(spec)
        if self.full:
            return self.all_lent()
        id, home = await self.lend(self._open_one(spec))
        return answer(wire.Opened(id=id, home=home, lease=self._options.lease))

    async def _open_one(self, spec: SandboxSpec) -> tuple[_Lent, str]:
        sandbox = await self._backend.open(spec)
        return _Lent(sandbox), sandbox.home

    async def _call(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if self.lent(id) is None:
            return self.gone(id)
        call = msgspec.msgpack.decode(await request.read(), type=wire.Call)
        lent = self.lent(id)
        if lent is None:  # closed while the body came in
            return self.gone(id)
        result = await _perform(call, lent)
        self.lent(id)
        return answer(result)

    async def _close(self, request: web.Request) -> web.Response:
        await self.take_back(request.match_info["id"])
        return answer(None)

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
