"""Sandboxes over HTTP: what goes wrong between a client and its servers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import aiohttp
import msgspec
import pytest

from sandboxes import wire
from sandboxes.base import Limits, SandboxSpec
from sandboxes.errors import (
    SandboxClosedError,
    SandboxError,
    SandboxUnavailableError,
    SandboxUnsupportedError,
)
from sandboxes.remote import RemoteBackend
from sandboxes.server import ServerOptions
from tests.sandboxes.conftest import TOKEN, Server, served

pytestmark = pytest.mark.xdist_group("sandboxes")

BACKEND = "bubblewrap"
LONG = ["sleep", "1000"]


@pytest.fixture(scope="module")
def server():
    """One with room for two, whose leases are short."""
    with served(BACKEND, "--sandboxes", "2", "--lease", "1", "--body-mib", "1") as running:
        yield running


def remote(*servers: Server, token: str = TOKEN, **options) -> RemoteBackend:
    return RemoteBackend([each.url for each in servers], token=token, **options)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


async def ask(server: Server, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
    """A request as anybody could make it; the status and the body of the answer."""
    known = {"Authorization": f"Bearer {TOKEN}", "Content-Type": wire.CONTENT_TYPE, **headers}
    data = body if body is None or isinstance(body, bytes) else msgspec.msgpack.encode(body)
    async with (
        aiohttp.ClientSession(headers=known) as session,
        session.request(method, server.url + path, data=data) as reply,
    ):
        return reply.status, await reply.read()


EXEC = msgspec.msgpack.encode(wire.Exec(argv=["true"]))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/sandboxes", SandboxSpec(), {"Authorization": ""}, 401),
        ("POST", "/v1/sandboxes", SandboxSpec(), {"Authorization": "Bearer guess"}, 401),
        ("POST", "/v1/sandboxes", SandboxSpec(), {"Authorization": TOKEN}, 401),
        ("GET", "/v1/findings", None, {"Authorization": "Bearer \udcff"}, 401),
        ("POST", "/v1/sandboxes", b"\xc1 garbage", {}, 400),
        ("POST", "/v1/sandboxes", {"limits": {"pids": -1}}, {}, 400),
        ("POST", "/v1/sandboxes", {"limits": {"pids": "many"}}, {}, 400),
        ("POST", "/v1/sandboxes", bytes(2**21), {}, 413),
        ("POST", "/v1/sandboxes", SandboxSpec(), {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/sandboxes/guess", EXEC, {}, 410),
        ("POST", "/v1/sandboxes/..%2F..%2Fetc", EXEC, {}, 410),
        ("DELETE", "/v1/sandboxes/guess", None, {}, 200),
        ("POST", "/v1/renew", {"ids": 3}, {}, 400),
        ("PUT", "/v1/sandboxes", EXEC, {}, 405),
        ("GET", "/", None, {}, 404),
    ],
)
def test_a_request_that_is_refused_harms_nobody(server, method, path, body, headers, status):
    async def scenario():
        async with await remote(server).open(SandboxSpec()) as sandbox:
            assert (await ask(server, method, path, body, **headers))[0] == status
            wrong = msgspec.msgpack.encode({"type": "no such call"})
            assert (await ask(server, "POST", f"/v1/sandboxes/{sandbox.id}", wrong))[0] == 400
            assert (await sandbox.exec(["echo", "here"])).text == "here\n"
            await sandbox._server.close()

    run(scenario())


def test_a_wrong_token_is_named(server):
    async def scenario():
        backend = remote(server, token="wrong")
        with pytest.raises(SandboxError, match=f"wrong or missing token.*{server.url}"):
            await backend.open(SandboxSpec())
        (finding,) = await backend.findings()
        assert (finding.what, finding.state) == (server.url, "missing")
        await backend.close()

    run(scenario())


def test_without_a_token_only_loopbacks_names_are_answered():
    options = ["--port", "0", "--backend", BACKEND]
    environment = {name: value for name, value in os.environ.items() if name != wire.TOKEN_VARIABLE}
    with served(BACKEND, environment=environment) as server:
        assert run(ask(server, "GET", "/health", Authorization=""))[0] == 200
        rebound = {"Authorization": "", "Host": "rebound.example:80"}
        assert run(ask(server, "POST", "/v1/sandboxes", SandboxSpec(), **rebound))[0] == 403
    command = [sys.executable, "-m", "k2rl.cli", "sandbox", "serve", *options, "--host", "0.0.0.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "give it a token" in done.stderr


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (SandboxSpec(read_only={"/data": "/etc"}), "/etc"),
        (SandboxSpec(read_only={"/data": "/usr/share/doc/../../../etc"}), "etc"),
        (SandboxSpec(image="/"), "image /"),
        (SandboxSpec(allow_hosts=("localhost:22",)), "localhost:22"),
        (SandboxSpec(limits=Limits(memory_bytes=2**40)), "memory_bytes"),
    ],
    ids=str,
)
def test_a_server_lends_what_it_was_told_to_lend(server, spec, named):
    async def scenario():
        backend = remote(server)
        with pytest.raises(SandboxUnsupportedError, match=named):
            await backend.open(spec)
        await backend.close()

    run(scenario())


async def load(server: Server) -> int:
    """How many sandboxes it has open."""
    status, answer = await ask(server, "POST", "/v1/renew", wire.Renew(ids=[]))
    assert status == 200
    return msgspec.msgpack.decode(answer, type=wire.Renewed).load.open


def test_a_lease_ends_with_its_client_and_not_before(server):
    async def scenario():
        backend = remote(server)
        async with await backend.open(SandboxSpec()) as kept:
            status, _ = await ask(server, "POST", "/v1/sandboxes", SandboxSpec())  # and is not heard of again
            assert (status, await load(server)) == (200, 2)
            while await load(server) == 2:
                await asyncio.sleep(0.1)
            assert (await kept.exec(["echo", "here"])).ok
        assert await load(server) == 0
        await backend.close()

    run(scenario())


def test_a_server_that_is_full_is_waited_for(server):
    async def scenario():
        backend, hasty = remote(server), remote(server, open_seconds=0.2)
        first, second = await backend.open(SandboxSpec()), await backend.open(SandboxSpec())
        with pytest.raises(SandboxError, match="had room within 0.2 s.*all 2 sandboxes are open"):
            await hasty.open(SandboxSpec())
        third = asyncio.create_task(backend.open(SandboxSpec()))
        await first.close()
        assert await (await third).is_alive()
        await second.close()
        await backend.close()
        await hasty.close()
        assert await load(server) == 0

    run(scenario())


def test_a_run_ends_when_its_client_goes_away(server):
    async def scenario():
        backend = remote(server)
        async with await backend.open(SandboxSpec()) as sandbox:
            # Renamed: one that is ended while it writes would leave an empty file.
            lasting = "while true; do date +%N > new; mv new alive; sleep 0.01; done"
            running = asyncio.create_task(sandbox.exec(["sh", "-c", lasting], timeout=1000))
            while not (await sandbox.exec(["ls", "alive"])).ok:
                await asyncio.sleep(0.05)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            before = ""
            while (now := (await sandbox.exec(["cat", "alive"])).text) != before or not now:
                before = now
                await asyncio.sleep(0.1)
        await backend.close()

    run(scenario())


def test_a_server_killed_in_mid_run_is_named():
    async def scenario():
        with served(BACKEND) as server:
            backend = remote(server)
            sandbox = await backend.open(SandboxSpec())
            shell = await sandbox.shell()
            running = asyncio.create_task(sandbox.exec(LONG, timeout=1000))
            assert (await shell.run("echo here")).ok
            server.process.kill()
            with pytest.raises(SandboxError, match=f"sandbox server {server.url} is gone"):
                await running
            with pytest.raises(SandboxError, match=server.url):
                await shell.run("true")
            assert not await sandbox.is_alive()
            with pytest.raises(SandboxUnavailableError, match=f"no sandbox server answers: .*{server.url}"):
                await backend.open(SandboxSpec())
            await sandbox.close()
            await backend.close()

    run(scenario())


def test_a_server_that_no_longer_answers_is_found_before_the_run_would_end():
    async def scenario():
        with served(BACKEND, "--lease", "1") as server:
            backend = remote(server)
            sandbox = await backend.open(SandboxSpec())
            running = asyncio.create_task(sandbox.exec(LONG, timeout=1000))
            server.process.send_signal(signal.SIGSTOP)
            with pytest.raises(SandboxError, match="was not heard of for 1 s"):
                await running
            with pytest.raises(SandboxClosedError, match="was not heard of"):
                await sandbox.exec(["true"])
            server.process.send_signal(signal.SIGCONT)
            await backend.close()

    run(scenario())


def test_a_new_server_does_not_know_the_old_ones_sandboxes():
    async def scenario():
        with served(BACKEND) as first:
            backend = remote(first)
            sandbox = await backend.open(SandboxSpec())
            await first.stop()
            with served(BACKEND, port=first.port):
                with pytest.raises(SandboxClosedError, match="the server is a new one"):
                    await sandbox.exec(["true"])
                assert await (await backend.open(SandboxSpec())).is_alive()
                await backend.close()

    run(scenario())


def test_sandboxes_go_where_there_is_room(server):
    async def scenario():
        with served(BACKEND, "--sandboxes", "4") as other:
            backend = remote(server, other)
            for _ in range(6):
                await backend.open(SandboxSpec())
            assert (await load(server), await load(other)) == (2, 4)
            await backend.close()
            server_and_gone = remote(server, other)
            await other.stop()
            for _ in range(2):  # whichever of them is asked first
                assert await (await server_and_gone.open(SandboxSpec())).is_alive()
            await server_and_gone.close()

    run(scenario())


def test_what_is_no_sandbox_server_is_told():
    async def scenario():
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
            port = web.sockets[0].getsockname()[1]
            backend = RemoteBackend(f"http://127.0.0.1:{port}")
            with pytest.raises(SandboxError, match="is no sandbox server: HTTP status 200, text/html"):
                await backend.open(SandboxSpec())
            await backend.close()

    run(scenario())


@pytest.mark.parametrize("urls", ["", "localhost:8020", ["ftp://host"]], ids=str)
def test_what_is_no_address(urls):
    with pytest.raises(ValueError, match="http://host:port"):
        RemoteBackend(urls)


def test_servers_are_named_by_a_variable_too(monkeypatch):
    monkeypatch.delenv(wire.SERVERS_VARIABLE, raising=False)
    with pytest.raises(SandboxUnavailableError, match="no sandbox server is named"):
        RemoteBackend()
    monkeypatch.setenv(wire.SERVERS_VARIABLE, "http://one:1 http://two:2")
    assert [each.url for each in RemoteBackend()._servers] == ["http://one:1", "http://two:2"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host": "0.0.0.0"}, "token"),
        ({"token": "short"}, "shorter than 16"),
        ({"capacity": 0}, "positive"),
        ({"lease": 0.0}, "positive"),
    ],
    ids=str,
)
def test_options_that_no_server_takes(options, named):
    with pytest.raises(ValueError, match=named):
        ServerOptions(**options)
