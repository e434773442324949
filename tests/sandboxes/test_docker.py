"""Containers: what is docker's own about them, and what goes wrong with a daemon."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import docker
import pytest

from k2rl.cli import main
from sandboxes.base import Limits, SandboxSpec
from sandboxes.docker import images, owner
from sandboxes.docker.backend import FOLDER, DockerBackend
from sandboxes.errors import SandboxClosedError, SandboxError, SandboxUnavailableError
from sandboxes.pool import SandboxPool

pytestmark = [pytest.mark.docker, pytest.mark.xdist_group("docker")]

OPEN_AND_WAIT = """
import asyncio, sys, time
from sandboxes.base import SandboxSpec
from sandboxes.docker.backend import DockerBackend
from sandboxes.pool import SandboxPool

async def main():
    sandbox = await SandboxPool(DockerBackend(), SandboxSpec(), 1).take()
    print(sandbox.id, flush=True)
    await sandbox.exec(["sleep", "1000"], timeout=1000)

asyncio.run(main())
"""


def run(scenario):
    """Run `scenario(backend)` with a backend of its own."""

    async def whole():
        backend = DockerBackend()
        try:
            return await asyncio.wait_for(scenario(backend), 120)
        finally:
            await backend.close()

    return asyncio.run(whole())


@pytest.fixture(scope="module")
def client():
    return docker.from_env(timeout=60)


def ours(client) -> set[str]:
    """The containers of this process."""
    return {
        each["Id"]
        for each in client.api.containers(all=True, filters={"label": f"{owner.LABEL}={owner.mine()}"})
    }


def test_how_a_container_is_made(client):
    """What the daemon says of it, beside what code in it can do (test_attacks.py)."""

    async def scenario(backend):
        sandbox = await backend.open(SandboxSpec(limits=Limits(memory_bytes=2**28, pids=20)))
        return await asyncio.to_thread(client.api.inspect_container, sandbox.id)

    about = run(scenario)
    host = about["HostConfig"]
    assert (host["NetworkMode"], host["CapAdd"], host["CapDrop"]) == ("none", None, ["ALL"])
    assert (host["ReadonlyRootfs"], host["Privileged"], host["AutoRemove"]) == (True, False, True)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["Memory"], host["MemorySwap"]) == (2**28, 2**28)
    assert host["PidsLimit"] == 28
    assert about["Config"]["User"] == "65534:65534"
    assert {each["Destination"] for each in about["Mounts"] if each["RW"]} == {"/work", "/tmp", "/dev/shm"}
    assert ours(client) == set()


def test_each_sandbox_is_a_new_container_warm_or_not(client):
    async def scenario(backend):
        pool = SandboxPool(backend, SandboxSpec(), ready=2)
        seen = set()
        for _ in range(4):
            async with pool.sandbox() as sandbox:
                assert (
                    await sandbox.exec(["sh", "-c", "ls -A /work /tmp /dev/shm | grep -v :"])
                ).text.strip() == ""
                assert (await sandbox.exec(["touch", "/work/a", "/tmp/b", "/dev/shm/c"])).ok
                seen.add(sandbox.id)
        assert len(seen) == 4
        await pool.close()

    run(scenario)
    assert ours(client) == set()


def test_a_sandbox_has_its_processes_whatever_others_run():
    """They all run as one user of the host, whose processes the kernel counts together."""
    limits = Limits(pids=12)

    async def scenario(backend):
        sandboxes = [await backend.open(SandboxSpec(limits=limits)) for _ in range(4)]
        eight = "for _ in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo begun; wait"
        runs = [asyncio.create_task(each.exec(["sh", "-c", eight], timeout=1000)) for each in sandboxes]
        for each in sandboxes:
            count = ["sh", "-c", "cat /proc/[0-9]*/comm | grep -c sleep"]
            while (await each.exec(count)).text != "8\n":
                assert not any(run.done() for run in runs)
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)

    run(scenario)


def test_a_container_killed_from_outside(client):
    async def scenario(backend):
        sandbox = await backend.open(SandboxSpec())
        running = asyncio.create_task(
            sandbox.exec(["sh", "-c", "echo begun; touch begun; sleep 1000"], timeout=1000)
        )
        while not (await sandbox.exec(["ls", "begun"])).ok:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(client.api.kill, sandbox.id)
        result = await running
        assert (result.ended, result.text) == ("killed", "begun\n")
        assert not await sandbox.is_alive()
        with pytest.raises(SandboxClosedError, match="was killed"):
            await sandbox.exec(["true"])
        with pytest.raises(SandboxClosedError):
            await sandbox.read_file("a")

    run(scenario)


def test_an_open_that_is_given_up_leaves_nothing(client):
    async def scenario(backend):
        for delay in (0.0, 0.05, 0.2):
            opening = asyncio.create_task(backend.open(SandboxSpec()))
            await asyncio.sleep(delay)  # whatever it is at then
            opening.cancel()
            await asyncio.wait({opening})
        while await asyncio.to_thread(ours, client):
            await asyncio.sleep(0.05)

    run(scenario)


def test_containers_end_with_a_killed_owner_and_the_rest_at_the_next_start(client):
    command = [sys.executable, "-c", OPEN_AND_WAIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        name = process.stdout.readline().strip()
        folders = list(Path(tempfile.gettempdir()).glob(f"{FOLDER}{process.pid}-*"))
        assert len(folders) == 1
        label = client.api.inspect_container(name)["Config"]["Labels"][owner.LABEL]
        process.send_signal(signal.SIGKILL)
    with_label = {"all": True, "filters": {"label": f"{owner.LABEL}={label}"}}
    for _ in range(600):
        # Those that had begun, by themselves; one that was created and not yet started stays.
        if not [each for each in client.api.containers(**with_label) if each["State"] != "created"]:
            break
        asyncio.run(asyncio.sleep(0.1))
    stale = client.api.create_container(images.DEFAULT, ["true"], labels={owner.LABEL: label})["Id"]
    foreign = client.api.create_container(images.DEFAULT, ["true"], labels={owner.LABEL: "other-boot/1/1"})[
        "Id"
    ]
    try:
        run(lambda backend: backend.open(SandboxSpec()))
        assert client.api.containers(**with_label) == []
        assert client.api.inspect_container(foreign)["State"]["Status"] == "created"
        assert not folders[0].exists()
    finally:
        client.api.remove_container(foreign)
    assert stale not in {each["Id"] for each in client.api.containers(all=True)}


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        (
            {"image": "no-such-image"},
            SandboxUnavailableError,
            "docker has no image no-such-image.*k2rl sandbox image",
        ),
        ({"image": "Not An Image"}, SandboxError, "invalid reference format"),
        ({"python": "/opt/python"}, SandboxUnavailableError, "has no /opt/python"),
        ({"python": "/bin/false"}, SandboxUnavailableError, "first process did not start"),
        ({"runtime": "no-such"}, SandboxError, "no-such"),
    ],
    ids=str,
)
def test_what_cannot_be_opened_says_why(client, options, error, named):
    async def scenario(_):
        backend = DockerBackend(**options)
        with pytest.raises(error, match=named):
            await backend.open(SandboxSpec())
        await backend.close()

    run(scenario)
    assert ours(client) == set()


def test_a_path_that_is_lent_and_is_not_there(client):
    with pytest.raises(SandboxError, match="/no/such/path"):
        run(lambda backend: backend.open(SandboxSpec(read_only={"/data": "/no/such/path"})))
    assert ours(client) == set()


def test_without_a_daemon(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")

    async def scenario(backend):
        with pytest.raises(
            SandboxUnavailableError, match="No such file or directory. Install docker and start it"
        ):
            await backend.open(SandboxSpec())
        (finding,) = await backend.findings()
        assert (finding.what, finding.state) == ("daemon", "missing")

    run(scenario)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_daemon_that_lets_us_not():
    code = (
        "import asyncio, os\n"
        "from sandboxes.base import SandboxSpec; from sandboxes.docker.backend import DockerBackend\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "asyncio.run(DockerBackend().open(SandboxSpec()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Permission denied" in done.stderr.splitlines()[-1]
    assert "member of the group docker" in done.stderr.splitlines()[-1]


def test_findings():
    async def scenario(backend):
        return {each.what: each for each in await backend.findings()}

    found = run(scenario)
    assert not [each for each in found.values() if each.state == "missing"]
    assert found["runtime"].state == "limited"
    assert images.DEFAULT in found["image"].detail


def test_a_user_that_is_none():
    for user in ("nobody", "0", "0:", "a:b", "1:2:3"):
        with pytest.raises(ValueError, match="uid:gid"):
            DockerBackend(user=user)


def test_images_of_ones_own(client, tmp_path, capsys):
    folder, root, broken = tmp_path / "folder", tmp_path / "root", tmp_path / "broken"
    for each in (folder, root, broken):
        each.mkdir()
    (folder / "hello").write_text("hello\n")
    (folder / "Dockerfile").write_text(
        f"FROM {images.DEFAULT}\nCOPY hello /opt/hello\nENV COLOUR=blue PATH=/opt:/usr/bin:/bin\n"
    )
    (broken / "Dockerfile").write_text("FROM scratch\nCOPY nothing /\n")
    (root / "file").write_text("")
    names = ("k2rl-test-folder:1", "k2rl-test-root:1")
    try:
        assert main(["sandbox", "image", "--dockerfile", str(folder), "--name", names[0]]) == 0
        assert main(["sandbox", "image", "--root", str(root), "--name", names[1]]) == 0
        assert capsys.readouterr().out.split() == list(names)
        assert main(["sandbox", "image", "--dockerfile", str(broken), "--name", "k2rl-test-none"]) == 1
        assert "COPY failed" in capsys.readouterr().err

        async def scenario(backend):
            async with await backend.open(SandboxSpec(image=names[0], env={"SHAPE": "round"})) as sandbox:
                said = await sandbox.exec(["sh", "-c", "echo $COLOUR $SHAPE $PATH; cat /opt/hello"])
                assert said.text == "blue round /opt:/usr/bin:/bin\nhello\n"
            with pytest.raises(SandboxUnavailableError, match=f"{names[1]} has no /usr/bin/python3"):
                await backend.open(SandboxSpec(image=names[1]))

        run(scenario)
    finally:
        for name in names:
            client.images.remove(name, force=True)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dockerfile", "."], "--name goes with"),
        (["--name", "x"], "--name goes with"),
        (["--root", "/no/such", "--name", "x"], "there is no /no/such"),
    ],
    ids=str,
)
def test_images_that_cannot_be_made(capsys, words, named):
    assert main(["sandbox", "image", *words]) == 2
    assert named in capsys.readouterr().err
