"""The proxy of sandboxes with `allow_hosts`: what it takes for a request, and whom it connects to."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxes import proxy
from sandboxes.base import SandboxSpec
from sandboxes.hosts import AllowedHosts, is_public, normal
from sandboxes.proxy import Proxy, RefusedError, read_head

PUBLIC = "93.184.216.34"


@pytest.mark.parametrize(
    ("entry", "targets"),
    [
        ("PyPI.org.:443", {("pypi.org", 443): None}),
        ("pypi.org", {("pypi.org", 80): None, ("pypi.org", 443): None}),
        ("10.0.0.7:8000", {("10.0.0.7", 8000): "10.0.0.7"}),
        ("[FD00::1]:80", {("fd00::1", 80): "fd00::1"}),
        ("mirror.internal:443=10.0.0.7", {("mirror.internal", 443): "10.0.0.7"}),
        ("mirror:8080=[fd00::1]", {("mirror", 8080): "fd00::1"}),
    ],
)
def test_entries(entry: str, targets: dict[Any, str | None]) -> None:
    read = AllowedHosts.read([entry]).targets
    assert {target: address and str(address) for target, address in read.items()} == targets


@pytest.mark.parametrize(
    "entry",
    [
        *("", ":443", "*:443", "*.org:443", "pypi.org:", "pypi.org:0", "pypi.org:65536", "pypi.org:http"),
        *("http://pypi.org", "pypi.org/simple", "user@pypi.org", "a b:1", "-a:1", "a..b:1", "127.1:80"),
        *("0x7f.1:80", "2130706433:80", "0x7f000001", "[::1:80", "pypi.org:443=mirror", "ä.org:80", "a\n:1"),
    ],
)
def test_what_is_no_entry_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="allow_hosts: "):
        SandboxSpec(allow_hosts=(entry,))


def test_what_nothing_survives_has_no_network() -> None:
    with pytest.raises(ValueError, match="ephemeral"):
        SandboxSpec(allow_hosts=("pypi.org",), ephemeral=True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((PUBLIC, True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("0.0.0.0", False)),
        *(("10.1.2.3", False), ("172.31.0.1", False), ("192.168.1.1", False), ("100.64.0.1", False)),
        *(("169.254.169.254", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False)),
        *(("::", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fd00:ec2::254", False)),
        *(("ff02::1", False), ("::ffff:127.0.0.1", False), (f"::ffff:{PUBLIC}", True)),
        *(("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False)),
        *(("2001:0:4136:e378:8000:63bf:3fff:fdd2", False), ("2606:2800:220:1::1%eth0", False)),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) == public


@given(st.text(max_size=30))
def test_a_host_is_normal_once(text: str) -> None:
    host = normal(text)
    assert host is None or normal(host) == host


NO_REQUESTS = [
    b"",
    b"GET / HTTP/1.1\r\nHost: there.test",
    b"CONNECT there.test HTTP/1.1",
    b"CONNECT there.test:80\r\nX: there.test:22 HTTP/1.1",
    b"CONNECT there.test:80\rX: y HTTP/1.1",
    b"CONNECT there.test:80\nHost: other HTTP/1.1",
    b"CONNECT there.test:80 HTTP/1.1 HTTP/1.1",
    b"CONNECT there.test:80\t HTTP/1.1",
    b"CONNECT there.test:80\0.other:80 HTTP/1.1",
    b"CONNECT other@there.test:80 HTTP/1.1",
    b"CONNECT there.test:80:22 HTTP/1.1",
    b"CONNECT http://there.test:80/ HTTP/1.1",
    b"CONNECT there%2etest:80 HTTP/1.1",
    b"CONNECT 127.1:80 HTTP/1.1",
    b"CONNECT 0x7f000001:80 HTTP/1.1",
    b"CONNECT 2130706433:80 HTTP/1.1",
    b"CONNECT [fe80::1%25eth0]:80 HTTP/1.1",
    b"CONNECT there.test:80 HTTP/1.1\r\nHost: a\nX: y",
    b"CONNECT there.test:80 HTTP/1.1\r\n folded: x",
    b"CONNECT there.test:80 HTTP/1.1\r\nNo colon",
    b"CONNECT there.test:80 HTTP/2",
    b"GET http://there.test@other/ HTTP/1.1",
    b"GET http://there.test\\@other/ HTTP/1.1",
    b"GET http://there.test:80:22/ HTTP/1.1",
    b"GET http://there.test/ a HTTP/1.1",
    b"GET http://there.test/\r\nX: y HTTP/1.1",
    b"GET http://there.test/#part HTTP/1.1",
    b"GET https://there.test/ HTTP/1.1",
    b"GET file:///etc/passwd HTTP/1.1",
    b"GET http:/there.test/ HTTP/1.1",
    b"get http://there.test/ HTTP/1.1",
    b"POST http://there.test/ HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4",
    b"POST http://there.test/ HTTP/1.1\r\nContent-Length: 3, 3",
    b"POST http://there.test/ HTTP/1.1\r\nContent-Length: +3",
    b"POST http://there.test/ HTTP/1.1\r\nTransfer-Encoding: chunked",
    b"POST http://there.test/ HTTP/1.1\r\nTransfer-Encoding : chunked",
    b"POST http://there.test/ HTTP/1.1\r\nContent-Length: 3\r\ntransfer-encoding: identity",
]


@pytest.mark.parametrize("head", NO_REQUESTS)
def test_what_could_be_read_in_two_ways_is_not_read(head: bytes) -> None:
    with pytest.raises(RefusedError):
        read_head(head + b"\r\n\r\n")


def test_a_head_of_any_form_is_read_at_once() -> None:
    """In time that grows with its length: a sandbox must not hold up its driver."""
    began = time.process_time()
    for head in (
        b"CONNECT a:1 HTTP/1.1\r\nX: " + b" " * 16_000 + b"\x01",
        b"CONNECT " + b"a." * 4000 + b":1 HTTP/1.1",
        b"GET http://" + b"a" * 7000 + b"/" + b"?" * 900 + b" HTTP/1.1",
        b"CONNECT a:1 HTTP/1.1" + b"\r\na:" * 4000 + b"\x00",
    ):
        with pytest.raises(RefusedError):
            read_head(head + b"\r\n\r\n")
    assert time.process_time() - began < 5


@given(st.binary(max_size=80), st.binary(max_size=40), st.sampled_from((b"GET", b"CONNECT")))
def test_what_is_passed_on_is_one_head(where: bytes, field: bytes, method: bytes) -> None:
    try:
        request = read_head(method + b" http://there.test/" + where + b" HTTP/1.1\r\n" + field + b"\r\n\r\n")
    except RefusedError:
        return
    assert request.target == ("there.test", 80)
    assert request.head.count(b"\r\n\r\n") == 1
    assert request.head.count(b"\n") == request.head.count(b"\r") == request.head.count(b"\r\n")
    assert request.head.split(b"\r\n")[1] == b"Host: there.test"


class Bench:
    """A proxy at a port of this machine, and a server that it may reach as `there.test`."""

    def __init__(self) -> None:
        self.port = self.there = 0
        self.answer = b"HTTP/1.1 200 OK\r\n\r\nhello"
        self.proxy: Proxy
        #: A task for each connection to the server, which comes to all that was sent there.
        self.connections: list[asyncio.Task[bytes]] = []

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(asyncio.create_task(self.serve(reader, writer)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        data = await reader.read(1 << 20)
        if length := re.search(rb"Content-Length: (\d+)", data):
            while len(data.partition(b"\r\n\r\n")[2]) < int(length[1]):
                data += await reader.read(1 << 20)
        if data:
            writer.write(self.answer)
            writer.write_eof()
        with suppress(ConnectionResetError):
            data += await reader.read()
        writer.close()
        return data

    async def ask(self, request: str | bytes) -> bytes:
        """What comes back for some bytes; `PORT` in them is the server's."""
        data = request if isinstance(request, bytes) else request.encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data.replace(b"PORT", str(self.there).encode()))
        try:
            return await asyncio.wait_for(reader.read(), 30)
        except ConnectionResetError:
            return b"reset"
        finally:
            writer.transport.abort()

    async def seen(self) -> list[bytes]:
        """What the server was sent in each connection; they have ended."""
        return await asyncio.gather(*self.connections)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone


def with_bench(
    work: Callable[[Bench], Awaitable[None]],
    entries: tuple[str, ...] = ("there.test:PORT=127.0.0.1",),
    most_bytes: int = 10_000,
    **options: Any,
) -> None:
    async def run() -> None:
        bench, before, tasks = Bench(), descriptors(), asyncio.all_tasks()
        server = await asyncio.start_server(bench.take, "127.0.0.1", 0)
        bench.there = server.sockets[0].getsockname()[1]
        listener = socket.create_server(("127.0.0.1", 0))
        bench.port = listener.getsockname()[1]
        allowed = AllowedHosts.read(entry.replace("PORT", str(bench.there)) for entry in entries)
        bench.proxy = Proxy(listener, allowed, most_bytes, **options)
        try:
            await work(bench)
        finally:
            await bench.proxy.close()
            await bench.seen()
            server.close()
            await server.wait_closed()
        await asyncio.sleep(0)
        # Nothing is left: no descriptor and no task.
        assert descriptors() <= before
        assert asyncio.all_tasks() == tasks

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_request_and_a_tunnel() -> None:
    async def work(bench: Bench) -> None:
        asked = "POST http://there.test:PORT/a?b HTTP/1.1\r\nHost: other.test\r\nContent-Length: 3\r\n"
        said = await bench.ask(asked + "Proxy-Authorization: Basic x\r\nConnection: keep-alive\r\n\r\nabc")
        assert said == bench.answer
        (seen,) = await bench.seen()
        head, _, body = seen.partition(b"\r\n\r\n")
        assert head.split(b"\r\n") == [
            b"POST /a?b HTTP/1.1",
            f"Host: there.test:{bench.there}".encode(),
            b"Connection: close",
            b"Content-Length: 3",
        ]
        assert body == b"abc"
        said = await bench.ask("CONNECT THERE.test.:PORT HTTP/1.1\r\nHost: x\r\n\r\nany bytes \0\xff")
        assert said == b"HTTP/1.1 200 Connection established\r\n\r\n" + bench.answer

    with_bench(work)


@pytest.mark.parametrize(
    "request_line",
    [
        "CONNECT there.test:1 HTTP/1.1",
        "CONNECT other.test:PORT HTTP/1.1",
        "CONNECT 127.0.0.1:PORT HTTP/1.1",
        "CONNECT localhost:PORT HTTP/1.1",
        "CONNECT [::1]:PORT HTTP/1.1",
        "CONNECT [::ffff:127.0.0.1]:PORT HTTP/1.1",
        "CONNECT 127.1:PORT HTTP/1.1",
        "CONNECT there.test:PORT@127.0.0.1:PORT HTTP/1.1",
        "GET http://127.0.0.1:PORT/ HTTP/1.1\r\nHost: there.test:PORT",
        "GET http://there.test/ HTTP/1.1\r\nHost: there.test:PORT",
        "GET / HTTP/1.1\r\nHost: there.test:PORT",
    ],
)
def test_nothing_else_is_connected_to(request_line: str) -> None:
    async def work(bench: Bench) -> None:
        said = await bench.ask(f"{request_line}\r\n\r\nGET / HTTP/1.1\r\n\r\n")
        assert said.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 ")), said
        assert bench.connections == []

    with_bench(work)


def test_a_second_request_is_not_passed_on() -> None:
    async def work(bench: Bench) -> None:
        second = "GET /second HTTP/1.1\r\nHost: other.test\r\n\r\n"
        await bench.ask(f"GET http://there.test:PORT/first HTTP/1.1\r\n\r\n{second}")
        await bench.ask(f"POST http://there.test:PORT/ HTTP/1.1\r\nContent-Length: 2\r\n\r\nab{second}")
        first, posted = await bench.seen()
        assert first.startswith(b"GET /first ")
        assert posted.endswith(b"\r\n\r\nab")
        assert b"second" not in first + posted

    with_bench(work)


def test_a_name_is_looked_up_once_and_only_public_addresses_are_connected_to() -> None:
    asked: list[str] = []
    reached: list[str] = []
    answers = [["127.0.0.1", PUBLIC, "10.0.0.1"], ["127.0.0.1", "::ffff:10.0.0.1"], ["169.254.169.254"], []]

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        found = answers.pop(0)
        if not found:
            raise socket.gaierror(-2, "no such name")
        return found

    async def connect(address: Any, port: int) -> Any:
        reached.append(str(address))
        raise ConnectionRefusedError

    async def work(bench: Bench) -> None:
        statuses = [
            (await bench.ask("CONNECT rebound.test:443 HTTP/1.1\r\n\r\n")).split()[1] for _ in range(4)
        ]
        assert statuses == [b"502", b"403", b"403", b"502"]
        # What is not allowed is not looked up, either: a lookup says something to whoever answers it.
        await bench.ask("CONNECT secret.rebound.test:443 HTTP/1.1\r\n\r\n")
        assert asked == ["rebound.test"] * 4
        assert reached == [PUBLIC]

    with_bench(work, ("rebound.test:443",), resolve=resolve, connect=connect)


def test_bytes_are_counted_over_all_connections() -> None:
    async def work(bench: Bench) -> None:
        bench.answer = b"x" * 6000
        assert (await bench.ask("CONNECT there.test:PORT HTTP/1.1\r\n\r\na")).endswith(b"x" * 6000)
        cut = await bench.ask("CONNECT there.test:PORT HTTP/1.1\r\n\r\na")
        assert cut.count(b"x") < 6000
        assert b"network_bytes" in await bench.ask("CONNECT there.test:PORT HTTP/1.1\r\n\r\na")
        assert len(bench.connections) == 2

    with_bench(work, most_bytes=8000)


def test_connections_at_once_are_bounded_and_silent_ones_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "MOST_CONNECTIONS", 2)
    monkeypatch.setattr(proxy, "HEAD_SECONDS", 0.5)

    async def work(bench: Bench) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", bench.port) for _ in range(4)]
        # It gets a place when silent ones have lost theirs.
        assert await bench.ask("GET http://there.test:PORT/ HTTP/1.1\r\n\r\n") == bench.answer
        for reader, writer in silent:
            assert await reader.read() == b""
            writer.transport.abort()

    with_bench(work)


def test_a_connection_without_a_byte_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "IDLE_SECONDS", 0.2)

    async def work(bench: Bench) -> None:
        said = await bench.ask("CONNECT there.test:PORT HTTP/1.1\r\n\r\n")
        assert said == b"HTTP/1.1 200 Connection established\r\n\r\n"

    with_bench(work)


def test_a_head_without_end_is_refused() -> None:
    async def work(bench: Bench) -> None:
        said = await bench.ask(b"CONNECT there.test:PORT HTTP/1.1\r\nX: " + b"a" * 100_000)
        assert said.startswith(b"HTTP/1.1 431 ") or said == b"reset"

    with_bench(work)
