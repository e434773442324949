"""The backend: what this machine has is looked for once, then sandboxes are opened."""

from __future__ import annotations

import asyncio
import marshal
import os
import platform
import secrets
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from sandboxes.base import Finding, SandboxSpec
from sandboxes.bubblewrap import agent, command, seccomp
from sandboxes.bubblewrap.cgroups import controllers, counts_by_namespace
from sandboxes.bubblewrap.keeping import KeeperClient
from sandboxes.bubblewrap.sandbox import OWN_PROCESSES, WATCH, BubblewrapSandbox, agent_settings, checked_env
from sandboxes.errors import SandboxError, SandboxUnavailableError, SandboxUnsupportedError

#: Seconds that a sandbox may take to start.
START_SECONDS = 60.0
NOBODY = 65534
AGENT_SOURCE = Path(agent.__file__)
ALLOW_NAMESPACES = (
    "let users make namespaces: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
    "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu), user.max_user_namespaces=10000 (Red Hat); "
    "in a container, start it with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"
)


class BubblewrapBackend:
    """Sandboxes of namespaces on this machine.

    Args:
        bwrap: the binary; looked for by default (`command.find_bwrap`).
        python: what runs the sandbox's agent and Python code, as a path in the sandbox; looked for by
            default.
        uid: whom sandboxes run as when this process is root; otherwise they run as its own user.
        running: most runs at once in all sandboxes together, others wait; four for each core by default.
        cgroups: whether to use control groups where they can be had.
    """

    name = "bubblewrap"

    def __init__(
        self,
        *,
        bwrap: str | None = None,
        python: str | None = None,
        uid: int = NOBODY,
        running: int | None = None,
        cgroups: bool = True,
    ) -> None:
        cores = len(os.sched_getaffinity(0))
        self._bwrap = Path(bwrap) if bwrap else None
        self._python = python
        self._uid = uid if os.geteuid() == 0 else None
        self._use_cgroups = cgroups
        self._turns = asyncio.Semaphore(running or 4 * cores)
        self._opening = asyncio.Semaphore(2 * cores)
        self._starting = asyncio.Lock()
        self._keeper: KeeperClient | None = None
        self._code: dict[tuple[str | None, str], bytes] = {}
        self._opened = 0
        self._open: dict[int, BubblewrapSandbox] = {}

    async def open(self, spec: SandboxSpec) -> BubblewrapSandbox:
        checked_env(spec.env)
        if spec.allow_hosts:
            raise SandboxUnsupportedError(
                "bubblewrap sandboxes have no network at all: allow_hosts must be empty"
            )
        if spec.image is not None and self._python is None:
            python = "/usr/bin/python3"
        else:
            python = self._python or command.find_python(self._uid)
        keeper = await self._kept()
        if keeper.cgroup == 0:
            self._check_count()
        async with self._opening:
            code = await self._agent_code(keeper, spec, python)
            settings = agent_settings(spec, controllers() if keeper.cgroup else ())
            number, connection, events = await self._launch(keeper, spec, python, code, settings)
        id = f"bubblewrap-{number}-{secrets.token_hex(4)}"
        sandbox = BubblewrapSandbox(
            id,
            spec,
            connection,
            keeper,
            number,
            events,
            self._turns,
            lambda number: self._open.pop(number, None),
        )
        self._open[number] = sandbox
        return sandbox

    async def findings(self) -> list[Finding]:
        try:
            return await self._findings()
        except SandboxError as error:
            return [Finding(what="sandboxes", state="missing", detail=str(error))]

    async def _findings(self) -> list[Finding]:
        binary = self._bwrap or command.find_bwrap()
        version = await asyncio.to_thread(command.bwrap_version, binary)
        began = time.monotonic()
        async with await self.open(SandboxSpec()) as sandbox:
            opened = time.monotonic()
            done = await sandbox.run_python("import os, sys; print(sys.version.split()[0], os.getuid())")
            ended = time.monotonic()
        if not done.ok:
            raise SandboxError(f"a first run ended with {done.exit_code}: {done.error_text[-300:]}")
        keeper = await self._kept()
        number, _ = done.text.split()
        python = self._python or command.find_python(self._uid)
        waited, took = (opened - began) * 1e3, (ended - opened) * 1e3
        speed = f"the first was opened in {waited:.0f} ms, its first run took {took:.0f} ms"
        who = "as your own user" if self._uid is None else f"as user {self._uid}, since you are root"
        good = [
            ("bubblewrap", f"{binary}, version {version}"),
            ("start", speed),
            ("python", f"{python}, version {number}"),
            ("user", f"they run {who}; inside they are user {command.USER} without any right"),
            ("kernel", f"{len(seccomp.DENIED)} system calls refused, no further user namespaces"),
            ("network", "none"),
            ("files", "in memory, bounded in size and number"),
        ]
        findings = [Finding(what=what, state="good", detail=detail) for what, detail in good]
        if keeper.cgroup:
            by_kernel = f"of all processes together, by the kernel (control groups, version {keeper.cgroup})"
            return [*findings, Finding(what="memory", state="good", detail=by_kernel)]
        detail = (
            f"of all processes together, measured every {WATCH * 1e3:.0f} ms while a run lasts, so it can "
            f"pass the limit for a moment; no control groups: {keeper.no_cgroups}"
        )
        mend = (
            "for the kernel to bound it, run as root, or with a group of your own: "
            "systemd-run --user --scope --property=Delegate=yes k2rl ..."
        )
        return [*findings, Finding(what="memory", state="limited", detail=detail, mend=mend)]

    async def close(self) -> None:
        await asyncio.gather(*(sandbox.close() for sandbox in list(self._open.values())))
        async with self._starting:
            keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await keeper.stop()

    async def _kept(self) -> KeeperClient:
        """The keeper, started anew if the last one died."""
        async with self._starting:
            if self._keeper is None or self._keeper.dead:
                seccomp.program()
                bwrap = self._bwrap or command.find_bwrap()
                await asyncio.to_thread(command.bwrap_version, bwrap)
                keeper = KeeperClient(bwrap, self._uid, self._use_cgroups)
                await keeper.start()
                self._keeper = keeper
            return self._keeper

    async def _agent_code(self, keeper: KeeperClient, spec: SandboxSpec, python: str) -> bytes:
        """The agent, compiled by the Python that will run it."""
        key = (spec.image, python)
        if key not in self._code:
            source = AGENT_SOURCE.read_bytes()  # noqa: ASYNC240 - a small file, once
            settings = marshal.dumps({"compile": True}, 2)
            number, connection, _ = await self._launch(keeper, spec, python, source, settings)
            connection.close()
            await keeper.close(number)
        return self._code[key]

    async def _launch(
        self, keeper: KeeperClient, spec: SandboxSpec, python: str, code: bytes, settings: bytes
    ) -> tuple[int, socket.socket, str]:
        """Start bubblewrap and wait for the agent's first words: its number, its socket, its events file."""
        self._opened += 1
        number = self._opened
        connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors, errors_in = os.pipe()
        file = os.memfd_create("agent")
        try:
            connection.setblocking(False)
            os.set_blocking(errors, False)
            os.write(file, code)
            connection.send(settings)
            events = await keeper.open(
                number,
                command.arguments(spec, python),
                spec.limits.memory_bytes,
                spec.limits.pids + OWN_PROCESSES,
                [theirs.fileno(), file, errors_in],
            )
            theirs.close()
            words = await self._first_words(connection, errors)
            if words != agent.READY:
                self._code[spec.image, python] = words
            return number, connection, events
        except BaseException:
            connection.close()
            keeper.kill(number)
            raise
        finally:
            theirs.close()
            for descriptor in (errors, errors_in, file):
                os.close(descriptor)

    async def _first_words(self, connection: socket.socket, errors: int) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            words = await asyncio.wait_for(loop.sock_recv(connection, 1 << 17), START_SECONDS)
        except TimeoutError:
            raise SandboxError(f"a sandbox did not start within {START_SECONDS:.0f} s") from None
        except ConnectionResetError:
            words = b""
        if words:
            return words
        try:
            said = os.read(errors, 1 << 16).decode("utf-8", "replace").strip()
        except BlockingIOError:
            said = ""
        raise SandboxUnavailableError(explained(said))

    def _check_count(self) -> None:
        if not Path("/proc/thread-self/children").exists():
            raise SandboxUnavailableError(
                "this kernel does not tell a process's children (CONFIG_PROC_CHILDREN), so nobody can measure"
                " a sandbox's memory without a control group: run as root or with a delegated group"
            )
        if not counts_by_namespace():
            raise SandboxUnavailableError(
                f"Linux {platform.release()} bounds no sandbox's processes without a control group: "
                "run as root or with a delegated group, or on Linux 5.14 or newer"
            )


def explained(said: str) -> str:
    """What bubblewrap or the agent said before it ended, and what helps where that is known."""
    lines: Sequence[str] = said.splitlines() or ["bubblewrap ended without a word"]
    last = lines[-1]
    if "Permission denied" in last or "Operation not permitted" in last or "No permissions" in last:
        return f"{last}; {ALLOW_NAMESPACES}"
    if "No space left" in last and "namespace" in said:
        return f"{last}; {ALLOW_NAMESPACES}"
    return last
