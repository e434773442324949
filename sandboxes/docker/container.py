"""One container: how it is started so that its first process can be trusted, and that it goes when we do.

Process 1 is the agent that bubblewrap's sandboxes have, too (`sandboxes/bubblewrap/agent.py`), and it is told
what to do over a socket of packets: `docker exec` would take a tenth of a second each time, and could end
neither what forked away nor say what ran out of memory. The socket is bound into the container, takes one
connection, that of the agent, and is unlinked. When it closes, because the sandbox is closed or this process
died, the agent ends, with it all processes of the container, and docker removes it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors

from sandboxes.base import SandboxSpec
from sandboxes.bubblewrap import agent
from sandboxes.bubblewrap.command import ENVIRONMENT
from sandboxes.bubblewrap.greeting import first_words
from sandboxes.bubblewrap.sandbox import OWN_PROCESSES
from sandboxes.docker import owner
from sandboxes.docker.daemon import Daemon
from sandboxes.docker.places import Places, writable_places
from sandboxes.errors import SandboxError, SandboxUnavailableError

START_SECONDS = 60.0
REMOVE_SECONDS = 60.0
INSIDE = "/.k2rl"
#: Connects, and becomes the agent with that connection as its first argument.
BOOT = f"""\
import _socket, sys
connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
connection.connect("{INSIDE}/socket")
sys.argv = ["agent", str(connection.detach())]
exec(compile(open("{INSIDE}/agent.py").read(), "agent.py", "exec"))
"""
#: Each place's share of `Limits.disk_bytes` and `Limits.inodes`: docker cannot let them share one file
#: system.
SHARES = {"/work": 12 / 16, "/tmp": 3 / 16, "/dev/shm": 1 / 16}
#: What docker hides of /proc by itself, all of /sys, and the queues that are files.
MASKED = (
    "/dev/mqueue",
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys",
)


#: What docker makes read-only by itself, and /dev, whose memory no limit of files counts.
READ_ONLY = ("/dev", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True)
class Settings:
    """What the backend decides about its containers."""

    owner: str
    folder: Path
    user: str
    python: str
    runtime: str | None
    cpus: float


class Container:
    """A running container with a connection to its agent; what a sandbox asks of its keeper."""

    def __init__(self, daemon: Daemon, name: str, uid: int | None) -> None:
        self._daemon = daemon
        self.name = name
        #: To whom the ends of pipes are given that go into it.
        self.uid = uid
        self.dead = ""
        self.connection: socket.socket
        #: Where its proxy is to listen, if it has one.
        self.listener: socket.socket | None = None
        #: The variables that its image sets.
        self.env: dict[str, str] = {}
        #: The kernel's count of processes killed for memory; empty where it cannot be seen.
        self.events = ""
        self._killing: set[asyncio.Task[None]] = set()
        #: Whether it is to be gone; a thread that is still starting it then removes it again.
        self._unwanted = False

    async def start(self, spec: SandboxSpec, image: str, settings: Settings, words: bytes) -> None:
        """Create it, start it and wait until its agent is ready.

        Raises:
            SandboxUnavailableError: there is no such image, or no Python in it.
            SandboxError: it did not start.
        """
        path = settings.folder / self.name
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.setblocking(False)
            listener.bind(str(path))
            # Whoever reaches the folder may connect, which on the host is this user, and in the container the
            # agent.
            path.chmod(0o666)
            listener.listen(1)
            with writable_places(path.with_suffix(".places"), spec.limits, settings.user) as places:
                config = self._config(spec, image, settings, path, places)
                begin = self._daemon.call("starting a container", lambda client: self._begin(client, config))
                output = await self._begun(begin, image, settings)
            with output:
                await self._meet(listener, output, words)
        finally:
            listener.close()
            path.unlink(missing_ok=True)

    def _config(
        self, spec: SandboxSpec, image: str, settings: Settings, path: Path, places: Places
    ) -> dict[str, Any]:
        limits = spec.limits
        mounts = [
            docker.types.Mount(inside, outside, type="bind", read_only=True)
            for inside, outside in {
                f"{INSIDE}/socket": str(path),
                f"{INSIDE}/agent.py": agent.__file__,
                **{inside: str(Path(outside).resolve()) for inside, outside in spec.read_only.items()},
            }.items()
        ]
        host = docker.types.HostConfig(
            docker.constants.DEFAULT_DOCKER_API_VERSION,
            auto_remove=True,
            cap_drop=["ALL"],
            ipc_mode="private",
            log_config=docker.types.LogConfig(type="none"),
            mem_limit=limits.memory_bytes,
            memswap_limit=limits.memory_bytes,
            mounts=mounts + places.mounts,
            nano_cpus=int(settings.cpus * 1e9),
            network_mode="none",
            pids_limit=limits.pids + OWN_PROCESSES,
            read_only=True,
            runtime=settings.runtime,
            security_opt=["no-new-privileges:true"],
            tmpfs=places.tmpfs,
        )
        host["MaskedPaths"], host["ReadonlyPaths"] = list(MASKED), list(READ_ONLY)
        return {
            "image": image,
            "name": self.name,
            "entrypoint": [settings.python, "-I", "-S", "-c", BOOT],
            "command": [],
            "user": settings.user,
            "hostname": "sandbox",
            "working_dir": "/",
            # What snippets see, which are forked from the agent. PATH is the image's.
            "environment": {name: value for name, value in ENVIRONMENT.items() if name != "PATH"},
            "labels": {owner.LABEL: settings.owner},
            "network_disabled": True,
            "host_config": host,
        }

    def _begin(self, client: docker.DockerClient, config: Mapping[str, Any]) -> socket.socket:
        """Create and start it, in a thread; returns a socket with what it writes before its agent is
        ready."""
        id = client.api.create_container(**config)["Id"]
        try:
            attached = client.api.attach_socket(id, {"stdout": 1, "stderr": 1, "stream": 1})
            client.api.start(id)
            about = client.api.inspect_container(id)
        except BaseException:
            self._remove(client)
            raise
        if self._unwanted:
            self._remove(client)
        self.env = dict(word.split("=", 1) for word in about["Config"]["Env"] or [] if "=" in word)
        self.events = events_of(about["State"]["Pid"])
        raw: socket.socket = attached._sock
        return raw.dup()

    async def _begun(self, begin: Any, image: str, settings: Settings) -> socket.socket:
        try:
            output: socket.socket = await begin
        except docker.errors.ImageNotFound:
            raise SandboxUnavailableError(
                f"docker has no image {image}: make it (k2rl sandbox image, or docker build), or pull it"
            ) from None
        except docker.errors.NotFound as error:
            raise SandboxError(f"starting a container of {image}: {error.explanation}") from None
        except SandboxError as error:
            if settings.python in str(error):
                raise SandboxUnavailableError(
                    f"the image {image} has no {settings.python}, which runs a sandbox's first process: "
                    "take an image with Python 3.9 or newer"
                ) from error
            raise
        return output

    async def _meet(self, listener: socket.socket, output: socket.socket, words: bytes) -> None:
        """Take the agent's connection and tell it what kind of sandbox this is."""
        loop = asyncio.get_running_loop()
        output.setblocking(False)
        said = asyncio.ensure_future(self._listen(output))
        accept = asyncio.ensure_future(loop.sock_accept(listener))
        try:
            await asyncio.wait({said, accept}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if accept.done():
                self.connection = accept.result()[0]
                self.connection.setblocking(False)
                await loop.sock_sendall(self.connection, words)
                with suppress(TimeoutError, ConnectionResetError):
                    words, self.listener = await first_words(self.connection, START_SECONDS)
                    if words == agent.READY:
                        return
                self.connection.close()
            await asyncio.wait({said}, timeout=1)
            last = said.result().splitlines()[-1:] if said.done() else []
            raise SandboxUnavailableError(
                f"the sandbox's first process did not start within {START_SECONDS:g} s: "
                f"{last[0] if last else 'does the docker daemon see the files of this machine?'}"
            )
        finally:
            said.cancel()
            accept.cancel()

    async def _listen(self, output: socket.socket) -> str:
        """What the container writes until it ends: frames of eight bytes and content."""
        data = b""
        while len(data) < 1 << 16 and (chunk := await asyncio.get_running_loop().sock_recv(output, 1 << 16)):
            data += chunk
        text = b""
        while len(data) >= 8:
            (size,) = struct.unpack(">I", data[4:8])
            text += data[8 : 8 + size]
            data = data[8 + size :]
        return text.decode("utf-8", "replace").strip()

    def kill(self, number: int = 0) -> None:
        """Kill every process in it."""
        task = asyncio.ensure_future(self.remove())
        self._killing.add(task)
        task.add_done_callback(self._killing.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # `close` tries again

    async def close(self, number: int = 0) -> None:
        """Wait until it is removed. Its connection is closed, so it ends by itself if its agent lives.

        Raises:
            SandboxError: it could not be removed.
        """
        self.dead = self.dead or "was closed"
        await self.remove()

    async def remove(self) -> None:
        self._unwanted = True
        await self._daemon.call("removing a container", self._remove, REMOVE_SECONDS)

    def _remove(self, client: docker.DockerClient) -> None:
        """Remove it by force, and come back when it is gone: docker may be removing it already."""
        try:
            client.api.remove_container(self.name, v=True, force=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if error.status_code != 409:  # in progress
                raise
            with suppress(docker.errors.NotFound):
                client.api.wait(self.name, timeout=REMOVE_SECONDS, condition="removed")

    async def usage(self, number: int = 0) -> int:
        """Nothing needs to look at a container's memory: the daemon has bound it."""
        return 0


def events_of(pid: int) -> str:
    """The file with the kernel's count of the processes it killed for memory, of a container's first
    process."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, names, path = line.split(":", 2)
        if "memory" in names.split(","):
            candidate = f"/sys/fs/cgroup/memory{path}/memory.oom_control"
        elif names == "":
            candidate = f"/sys/fs/cgroup{path}/memory.events"
        else:
            continue
        if os.access(candidate, os.R_OK):
            return candidate
    return ""
