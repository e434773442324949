"""Sandboxes with `allow_hosts`: what code in them reaches of a server of this machine, and what not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sandboxes.base import KIB, MIB, SandboxSpec
from sandboxes.errors import SandboxUnsupportedError
from sandboxes.registry import create
from tests.sandboxes.conftest import TOKEN, Called, Lab, Server, served
from tests.sandboxes.unprivileged import run_as_nobody

pytestmark = pytest.mark.xdist_group("sandboxes")
NAME = "mirror.test"

FETCH = """
import urllib.request
print(urllib.request.urlopen("http://{name}:{port}/a", timeout=20).read().decode())
"""
POST = """
import urllib.request
print(urllib.request.urlopen("http://{name}:{port}/", b"x" * 300_000, timeout=20).read().decode())
"""
TUNNEL = """
import http.client
connection = http.client.HTTPConnection("127.0.0.1", 3128, timeout=20)
connection.set_tunnel("{name}", {port})
connection.request("GET", "/tunnel")
print(connection.getresponse().read().decode())
"""
#: Each prints what it got hold of; what it is after is the server's greeting, without asking for what is
#: allowed.
ATTACKS = {
    "the server, directly": "s = socket.create_connection(('127.0.0.1', PORT), 3); say(ask(s))",
    "the server by this machine's address": "s = socket.create_connection((ADDRESS, PORT), 3); say(ask(s))",
    "another port": "say(through('CONNECT mirror.test:22'))",
    "another name": "say(through('CONNECT localhost:PORT'))",
    "an address": "say(through('CONNECT 127.0.0.1:PORT'))",
    "an address in IPv6's clothes": "say(through('CONNECT [::ffff:127.0.0.1]:PORT'))",
    "an address as one number": "say(through('CONNECT 2130706433:PORT'))",
    "this machine's address": "say(through(f'CONNECT {ADDRESS}:PORT'))",
    "a name server": "socket.getaddrinfo('example.com', 80); say('reached')",
    "a lookup by the proxy": "say(through('CONNECT secret.example.com:443'))",
    "a line break in CONNECT": "say(through('CONNECT 127.0.0.1:PORT HTTP/1.1\\r\\nX: mirror.test:PORT'))",
    "an account in CONNECT": "say(through('CONNECT mirror.test:PORT@127.0.0.1:PORT'))",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); say('reached')",
    "a packet": "socket.socket(17, socket.SOCK_RAW, 3); say('reached')",
    "a route": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('8.8.8.8', 53)); say('reached')",
    "the proxy's port": "socket.create_server(('127.0.0.1', 3128)); say('reached')",
    "the proxy's port, shared": (
        "s = socket.socket()\n"
        "for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT): s.setsockopt(1, option, 1)\n"
        "s.bind(('127.0.0.1', 3128)); s.listen(); say('reached')"
    ),
}
PRELUDE = """
import json, socket, sys
PORT, ADDRESS = json.loads(sys.argv[1])
def say(got):
    print(got if isinstance(got, str) else got.decode("latin-1"))
def ask(s):
    s.sendall(b"GET /attack HTTP/1.0\\r\\n\\r\\n")
    return s.recv(9999)
def through(line):
    s = socket.create_connection(("127.0.0.1", 3128), 20)
    s.sendall(f"{line.replace('PORT', str(PORT))} HTTP/1.1\\r\\n\\r\\n".encode())
    said = s.recv(9999)
    return said + (ask(s) if b" 200 " in said else b"")
"""


class Mirror(ThreadingHTTPServer):
    """Says hello, and keeps what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("0.0.0.0", 0), _Handler)
        self.asked: list[str] = []
        self.port = self.server_address[1]
        #: Connections so far, and those of them that are over.
        self.taken = self.over = 0
        self._change = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.taken += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        super().process_request_thread(request, client_address)
        with self._change:
            self.over += 1
            self._change.notify_all()

    def wait(self, taken: int) -> None:
        """Until so many connections were there, and none is left."""
        with self._change:
            assert self._change.wait_for(lambda: self.taken == self.over >= taken, 60)


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self._hello()

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        if len(self.rfile.read(length)) == length:
            self._hello()

    def _hello(self) -> None:
        self.server.asked.append(self.path)
        body = f"hello {self.path} {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def opened(lab: Lab, mirror: Mirror, **limits: Any) -> Iterator[Called]:
    if lab.backend.name == "remote":
        pytest.skip("its server would have to know the port beforehand: see the test below")
    with lab.open(limits, allow_hosts=(f"{NAME}:{mirror.port}=127.0.0.1",)) as sandbox:
        yield sandbox


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names alone


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def test_what_is_allowed_is_reached(lab: Lab, mirror: Mirror) -> None:
    with opened(lab, mirror) as sandbox:
        for source, path in ((FETCH, "/a"), (POST, "/"), (TUNNEL, "/tunnel")):
            ran = sandbox.run_python(source.format(name=NAME, port=mirror.port))
            assert ran.text.strip() == f"hello {path} {NAME}:{mirror.port}", ran.error_text
        # Programs and shells are told of the proxy, too.
        fetch = FETCH.format(name=NAME, port=mirror.port)
        assert "hello" in sandbox.exec(["python3", "-c", fetch]).text
        shell = Called(lab, sandbox.shell())
        assert shell.run("echo $https_proxy").text.strip() == "http://127.0.0.1:3128"
        shell.close()


def test_nothing_else_is_reached(lab: Lab, mirror: Mirror) -> None:
    target = json.dumps([mirror.port, own_address()])
    mirror.asked.clear()
    with opened(lab, mirror) as sandbox:
        got = {
            name: sandbox.run_python(PRELUDE + source, argv=[target]).text for name, source in ATTACKS.items()
        }
        assert sandbox.is_alive()
    refused = ("HTTP/1.1 400 ", "HTTP/1.1 403 ")
    assert {name: said for name, said in got.items() if said and not said.startswith(refused)} == {}
    assert mirror.asked == []


def test_without_allowed_hosts_there_is_no_proxy(lab: Lab) -> None:
    with lab.open() as sandbox:
        ran = sandbox.run_python("import socket; socket.create_connection(('127.0.0.1', 3128), 3)")
        assert "ConnectionRefusedError" in ran.error_text
        assert "proxy" not in sandbox.exec(["env"]).text.lower()


def test_bytes_are_bounded(lab: Lab, mirror: Mirror) -> None:
    with opened(lab, mirror, network_bytes=100 * KIB) as sandbox:
        assert not sandbox.run_python(POST.format(name=NAME, port=mirror.port)).ok
        ran = sandbox.run_python(FETCH.format(name=NAME, port=mirror.port))
        assert "403" in ran.error_text


def test_a_closed_sandbox_leaves_no_connection(lab: Lab, mirror: Mirror) -> None:
    if lab.backend.name == "remote":
        pytest.skip("its descriptors are elsewhere")
    with opened(lab, mirror) as sandbox:
        sandbox.exec(["true"])
    before, seen = descriptors(), mirror.taken
    hold = f"""
import socket, time
held = [socket.create_connection(("127.0.0.1", 3128)) for _ in range(8)]
for each in held[:4]:
    each.sendall(b"CONNECT {NAME}:{mirror.port} HTTP/1.1\\r\\n\\r\\n")
    each.recv(99)
print("held", flush=True)
time.sleep(100)
"""
    with opened(lab, mirror) as sandbox:
        sandbox.write_file("hold.py", hold.encode())
        shell = Called(lab, sandbox.shell())
        shell.run("python3 hold.py > said & until grep -q held said; do sleep 0.01; done")
        assert len(descriptors()) >= len(before) + 12
    shell.close()
    mirror.wait(seen + 4)
    assert descriptors() <= before


def test_a_flood_of_connections_ends_with_the_run(lab: Lab, mirror: Mirror) -> None:
    flood = (
        "import socket, threading\n"
        "def work():\n"
        "    while True:\n"
        "        try: socket.create_connection(('127.0.0.1', 3128), 1).close()\n"
        "        except OSError: pass\n"
        "for _ in range(8): threading.Thread(target=work).start()\n"
    )
    with opened(lab, mirror, memory_bytes=256 * MIB) as sandbox:
        assert sandbox.run_python(flood, timeout=2).ended == "timed_out"
        assert "hello" in sandbox.run_python(FETCH.format(name=NAME, port=mirror.port)).text


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)])
def test_a_server_lends_the_hosts_that_it_was_told_to_lend(backend: str, mirror: Mirror) -> None:
    entry = f"{NAME}:{mirror.port}=127.0.0.1"

    async def work(server: Server) -> str:
        door = create("remote", urls=server.url, token=TOKEN)
        with pytest.raises(SandboxUnsupportedError, match="lend-host"):
            await door.open(SandboxSpec(allow_hosts=(f"{NAME}:{mirror.port}=127.0.0.2",)))
        async with await door.open(SandboxSpec(allow_hosts=(entry,))) as sandbox:
            ran = await sandbox.run_python(FETCH.format(name=NAME, port=mirror.port))
        await door.close()
        return ran.text

    with served(backend, "--lend-host", entry) as server:
        assert asyncio.run(work(server)).startswith("hello /a")


AS_NOBODY = """
import asyncio, sys
from sandboxes.base import SandboxSpec
from sandboxes.registry import create
async def work():
    backend = create("bubblewrap")
    spec = SandboxSpec(allow_hosts=(sys.argv[1],))
    async with await backend.open(spec) as sandbox:
        print((await sandbox.run_python(sys.argv[2])).text)
    await backend.close()
asyncio.run(work())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_nobody_has_it_as_well(mirror: Mirror) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entry, source = f"{NAME}:{mirror.port}=127.0.0.1", FETCH.format(name=NAME, port=mirror.port)
        done = run_as_nobody(Path(folder), "-c", AS_NOBODY, entry, source)
    assert done.stdout.startswith("hello /a"), done.stderr
