"""A docker daemon that goes away and comes back, here one of our own, so that nobody else's is disturbed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time

import docker
import pytest

from sandboxes.base import SandboxSpec
from sandboxes.docker import images
from sandboxes.docker.backend import DockerBackend
from sandboxes.errors import SandboxClosedError, SandboxError

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.xdist_group("docker"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a docker daemon"),
]


class Daemon:
    def __init__(self, folder):
        self.folder = folder
        self.url = f"unix://{folder}/docker.sock"
        self.process = None

    def start(self):
        options = ["--bridge=none", "--iptables=false", "--ip6tables=false", f"--host={self.url}"]
        options += [f"--{name}={self.folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
        # Of a daemon that was killed, whose containerd may be ending yet.
        for stale in ("pidfile", "exec-root/containerd/containerd.pid"):
            (self.folder / stale).unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(["dockerd", *options], stdout=log, stderr=log)
        for _ in range(600):
            try:
                return docker.DockerClient(self.url, timeout=60)
            except docker.errors.DockerException:
                assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.1)  # until it answers
        raise AssertionError("the daemon did not start")

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(60)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    """A daemon with the default image."""
    daemon = Daemon(tmp_path_factory.mktemp("docker"))
    client = daemon.start()
    try:
        client.images.load(docker.from_env(timeout=60).images.get(images.DEFAULT).save(named=True))
        yield daemon
    finally:
        daemon.end()
        shutil.rmtree(daemon.folder)


def play(daemon, monkeypatch, scenario):
    monkeypatch.setenv("DOCKER_HOST", daemon.url)

    async def whole():
        backend = DockerBackend()
        await asyncio.wait_for(scenario(backend), 200)
        await backend.close()

    asyncio.run(whole())


def test_a_daemon_that_is_restarted_under_a_run(daemon, monkeypatch):
    async def scenario(backend):
        sandbox = await backend.open(SandboxSpec())
        running = asyncio.create_task(sandbox.exec(["sh", "-c", "echo begun; sleep 1000"], timeout=1000))
        assert (await sandbox.exec(["true"])).ok
        await asyncio.to_thread(daemon.end)  # ends its containers, as daemons do
        result = await running
        assert (result.ended, result.text) == ("killed", "begun\n")
        assert not await sandbox.is_alive()
        with pytest.raises(SandboxClosedError):
            await sandbox.exec(["true"])
        with pytest.raises(SandboxError, match="starting a container: docker's daemon went away"):
            await backend.open(SandboxSpec())
        client = await asyncio.to_thread(daemon.start)
        async with await backend.open(SandboxSpec()) as new:
            assert (await new.exec(["echo", "here"])).text == "here\n"
        await sandbox.close()
        assert client.containers.list(all=True) == []

    play(daemon, monkeypatch, scenario)


def test_a_daemon_that_is_killed(daemon, monkeypatch):
    async def scenario(backend):
        sandbox = await backend.open(SandboxSpec())
        await asyncio.to_thread(daemon.end, signal.SIGKILL)
        # The container does not need it, but nobody can remove it now.
        assert (await sandbox.exec(["echo", "here"])).text == "here\n"
        with pytest.raises(SandboxError, match="removing a container: docker's daemon went away"):
            await sandbox.close()
        client = await asyncio.to_thread(daemon.start)
        while await asyncio.to_thread(client.containers.list, all=True):  # it ended with its connection
            await asyncio.sleep(0.1)

    play(daemon, monkeypatch, scenario)
