"""The backend: containers of one daemon. `sandboxes.pool` starts some of them ahead of need."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import docker.errors

from sandboxes.base import ExecResult, Finding, SandboxSpec
from sandboxes.bubblewrap.cgroups import started
from sandboxes.bubblewrap.command import COVERED, ENVIRONMENT
from sandboxes.bubblewrap.sandbox import BubblewrapSandbox, agent_settings, checked_env
from sandboxes.docker import findings, images, owner
from sandboxes.docker.container import INSIDE, Container, Settings
from sandboxes.docker.daemon import Daemon
from sandboxes.docker.places import unmount
from sandboxes.errors import SandboxError, SandboxUnsupportedError

NOBODY = 65534
FOLDER = "k2rl-docker-"


class DockerBackend:
    """Sandboxes that are containers of this machine's docker daemon. It belongs to one event loop.

    Each is a new container, and a closed one is removed.

    Args:
        image: what a spec without an image gets; by default Debian's own packages (`images.py`).
        user: whom code runs as, as `uid:gid`; by default nobody if this process is root, else its own user.
        python: what runs the agent and Python code, as a path in the image.
        runtime: another runtime that the daemon knows, such as gVisor's `runsc`.
        cpus: cores of a sandbox; 0: all.
        running: most runs at once in all sandboxes together, others wait; four for each core by default.
    """

    name = "docker"

    def __init__(
        self,
        *,
        image: str = images.DEFAULT,
        user: str | None = None,
        python: str = "/usr/bin/python3",
        runtime: str | None = None,
        cpus: float = 0.0,
        running: int | None = None,
    ) -> None:
        uid, gid = (os.geteuid(), os.getegid()) if os.geteuid() else (NOBODY, NOBODY)
        user = user or f"{uid}:{gid}"
        if not all(part.isdecimal() for part in user.split(":")) or user.count(":") != 1:
            raise ValueError(f"user {user!r} is not of the form uid:gid")
        cores = len(os.sched_getaffinity(0))
        self._image, self._runtime = image, runtime
        self._user, self._python, self._cpus = user, python, cpus
        # Only root can give a pipe to somebody else.
        self._uid = int(user.split(":")[0]) if os.geteuid() == 0 else None
        self._daemon = Daemon()
        self._turns = asyncio.Semaphore(running or 4 * cores)
        self._opening = asyncio.Semaphore(2 * cores)
        self._preparing: asyncio.Task[Settings] | None = None
        self._open: dict[int, DockerSandbox] = {}
        self._opened = 0
        self._ends: set[asyncio.Task[None]] = set()

    async def open(self, spec: SandboxSpec) -> DockerSandbox:
        """See `Backend.open`."""
        checked_env(spec.env)
        if spec.allow_hosts:
            raise SandboxUnsupportedError("docker sandboxes have no network: allow_hosts must be empty")
        if spec.links:
            raise SandboxUnsupportedError("docker sandboxes have no links but those of their image")
        for inside, outside in spec.read_only.items():
            if not inside.startswith("/") or inside.startswith((*COVERED, "/sys", INSIDE)):
                raise SandboxUnsupportedError(
                    f"{outside} cannot appear at {inside}: take a folder of its own"
                )
        settings = await self._prepared()
        self._opened += 1
        number = self._opened
        name = f"k2rl-{secrets.token_hex(8)}"
        container = Container(self._daemon, name, self._uid)
        async with self._opening:
            try:
                words = agent_settings(spec, ("memory", "pids"), finished=True)
                await container.start(spec, spec.image or self._image, settings, words)
            except BaseException as error:
                removal = self._later(container.remove())
                if isinstance(error, SandboxError):
                    await asyncio.wait({removal})
                    if not removal.cancelled():
                        removal.exception()  # what cannot be removed was hardly made: `error` says why
                raise
        forget = lambda number: self._open.pop(number, None)  # noqa: E731
        sandbox = DockerSandbox(name, spec, container, number, self._turns, forget)
        self._open[number] = sandbox
        return sandbox

    def _later(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is at an end when the backend is closed."""
        task = asyncio.create_task(work)
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)
        return task

    async def findings(self) -> list[Finding]:
        """See `Backend.findings`."""
        try:
            return await self._daemon.call(
                "asking what it can do", lambda client: findings.look(client, self._image, self._runtime)
            )
        except SandboxError as error:
            return [Finding(what="daemon", state="missing", detail=str(error))]

    async def close(self) -> None:
        """See `Backend.close`."""
        for sandbox in list(self._open.values()):
            self._later(sandbox.close())
        ends: list[object] = []
        while self._ends:
            ends += await asyncio.gather(*self._ends, return_exceptions=True)
        if self._preparing is not None:
            with suppress(SandboxError):  # who opened a sandbox was told
                shutil.rmtree((await self._preparing).folder)
        self._daemon.close()
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    async def _prepared(self) -> Settings:
        """What is done once, and to its end even if who asked first has gone."""
        failed = self._preparing is not None and self._preparing.done() and self._preparing.exception()
        if self._preparing is None or failed:
            self._preparing = asyncio.create_task(self._prepare())
        return await asyncio.shield(self._preparing)

    async def _prepare(self) -> Settings:
        """Make the folder of sockets, and end what dead processes left behind."""
        await self._daemon.call("removing containers of dead processes", reap_containers)
        await asyncio.to_thread(reap_folders)
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-{started(os.getpid())}-"))
        return Settings(
            owner=owner.mine(),
            folder=folder,
            user=self._user,
            python=self._python,
            runtime=self._runtime,
            cpus=self._cpus,
        )


class DockerSandbox(BubblewrapSandbox):
    """A container. It has the agent of bubblewrap's sandboxes, and so their ways (see `Sandbox`)."""

    def __init__(
        self,
        id: str,
        spec: SandboxSpec,
        container: Container,
        number: int,
        turns: asyncio.Semaphore,
        forget: Callable[[int], object],
    ) -> None:
        super().__init__(id, spec, container.connection, container, number, container.events, turns, forget)
        # The image's own PATH is where it has its programs.
        self._env = {**ENVIRONMENT, **container.env, **spec.env}

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
            raise SandboxUnsupportedError(
                f"a docker sandbox has the one user that its backend was given; there is no {user!r}"
            )
        return await super().exec(argv, stdin=stdin, env=env, cwd=cwd, timeout=timeout)


def reap_containers(client: docker.DockerClient) -> None:
    """Remove the containers of processes that have died."""
    for about in client.api.containers(all=True, filters={"label": owner.LABEL}):
        if owner.is_dead(about["Labels"][owner.LABEL]):
            with suppress(docker.errors.APIError):  # somebody else is removing it
                client.api.remove_container(about["Id"], v=True, force=True)


def reap_folders() -> None:
    """Remove the folders of sockets of processes that have died."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        pid, start = folder.name.removeprefix(FOLDER).split("-")[:2]
        try:
            alive = started(int(pid)) == int(start)
        except (FileNotFoundError, ProcessLookupError):
            alive = False
        if not alive and folder.stat().st_uid == os.geteuid():
            for each in folder.iterdir():
                if each.is_mount():  # killed while it started a container
                    unmount(each)
            shutil.rmtree(folder, ignore_errors=True)  # another process may be at it
