"""What a sandbox with `allow_hosts` has for a network: an HTTP proxy of ours, at its own loopback.

The sandbox keeps its empty network namespace. Its first process, before any code runs in it, makes a
listening socket there and hands it out to us; so whoever connects to it inside talks to this process, and
nothing else has changed: no route, no name server, no socket in its files, no process more. The proxy does
`CONNECT` and plain `http://` requests to what is allowed, asks name servers itself and connects to the very
address that it has checked. It takes one request of a connection, exactly as long as its `Content-Length`
says.

Bytes, connections at once and their time are bounded. What is behind an allowed host is reachable: a name
whose address other names share (a CDN) may lead to those, inside TLS, where nobody can look.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sandboxes.hosts import Address, AllowedHosts, Target, is_public, literal, normal

PORT = 3128
"""Where it listens, at each sandbox's own 127.0.0.1."""
MOST_CONNECTIONS = 32
"""Of a sandbox at once; further ones wait in the kernel, a few of them."""
PACE = 0.01
"""Seconds between two connections that are taken: whoever floods the proxy waits, and not this process."""
HEAD_BYTES, HEAD_FIELDS = 16 * 1024, 100
HEAD_SECONDS = 20.0
CONNECT_SECONDS = 20.0
IDLE_SECONDS = 60.0
"""Without a byte in either direction."""
MOST_SECONDS = 3600.0
"""Of a connection."""
LINGER_SECONDS = 1.0
CHUNK = 1 << 16
VARIABLES = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), f"http://127.0.0.1:{PORT}"),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1,::1"),
}
"""What tells programs of it."""

LOG = logging.getLogger(__name__)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]{1,8000}) HTTP/1\.[01]")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_URL = re.compile(r"http://([^/?#]+)([/?][^#]*)?")
#: Of this connection alone, and so not passed on.
_HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"upgrade"),
    )
)


class RefusedError(Exception):
    """A request that is not done: a status and what is said to whoever asked."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Request:
    """A request's head, read: where it wants to go, and what is sent there; nothing for `CONNECT`."""

    target: Target
    head: bytes = b""
    #: Bytes that follow the head.
    body: int = 0


def read_head(data: bytes) -> Request:
    """What a request asks for.

    Raises:
        RefusedError: it is no request that this proxy knows. Nothing in it is guessed at.
    """
    line, *fields = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    if len(fields) > HEAD_FIELDS:
        raise RefusedError("431 Request Header Fields Too Large", "there are too many headers")
    found = _LINE.fullmatch(line)
    if found is None:
        raise RefusedError("400 Bad Request", "the first line is no HTTP/1.1 request to a proxy")
    method, where = found[1], found[2].decode("ascii")
    headers = []
    for field in fields:
        parts = _FIELD.fullmatch(field)
        if parts is None:
            raise RefusedError("400 Bad Request", "a line of the head is no header")
        headers.append((parts[1].lower(), parts[1], parts[2].strip(b" \t")))
    if method == b"CONNECT":
        return Request(_target(where, None))
    url = _URL.fullmatch(where)
    if url is None:
        raise RefusedError("400 Bad Request", "a proxy is asked with CONNECT, or for http://HOST/…")
    target = _target(url[1], 80)
    path = url[2] or "/"
    host, port = target
    name = f"[{host}]" if ":" in host else host
    kept = [
        b"%s: %s" % (spelled, value)
        for lower, spelled, value in headers
        if lower not in _HOP_BY_HOP and lower != b"host"
    ]
    lines = [
        f"{method.decode()} {path if path.startswith('/') else '/' + path} HTTP/1.1".encode(),
        f"Host: {name}{'' if port == 80 else f':{port}'}".encode(),
        b"Connection: close",
        *kept,
    ]
    return Request(target, b"\r\n".join(lines) + b"\r\n\r\n", _length(headers))


def _target(authority: str, port: int | None) -> Target:
    found = _AUTHORITY.fullmatch(authority)
    host = None if found is None else normal(found[1])
    if found is None or host is None or (found[2] is None and port is None):
        raise RefusedError("400 Bad Request", "the target is no HOST:PORT")
    return host, int(found[2] or port or 0)


def _length(headers: list[tuple[bytes, bytes, bytes]]) -> int:
    """Bytes of the body, which are said once and plainly: what follows them could be another request."""
    lengths = [value for lower, _, value in headers if lower == b"content-length"]
    if any(lower == b"transfer-encoding" for lower, _, _ in headers):
        raise RefusedError("411 Length Required", "a body needs its Content-Length, through this proxy")
    if len(lengths) > 1 or not all(re.fullmatch(rb"[0-9]{1,15}", value) for value in lengths):
        raise RefusedError("400 Bad Request", "Content-Length is no number, or there are several")
    return int(lengths[0]) if lengths else 0


async def resolved(host: str, port: int) -> list[str]:
    """The addresses of a name, asked of this machine's name servers.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


async def connected(address: Address, port: int) -> Streams:
    """A connection to an address.

    Raises:
        OSError: there is none to be had.
    """
    return await asyncio.open_connection(str(address), port, limit=CHUNK)


class Proxy:
    """The proxy of one sandbox, from its making to `close`. It belongs to the running event loop."""

    def __init__(
        self,
        listener: socket.socket,
        allowed: AllowedHosts,
        most_bytes: int,
        *,
        resolve: Callable[[str, int], Awaitable[list[str]]] = resolved,
        connect: Callable[[Address, int], Awaitable[Streams]] = connected,
    ) -> None:
        """`listener` is the proxy's from now on; `most_bytes` bounds both directions of all connections
        together."""
        listener.setblocking(False)
        self._listener, self._allowed, self._left = listener, allowed, most_bytes
        self._resolve, self._connect = resolve, connect
        self._places = asyncio.Semaphore(MOST_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._accept())

    def stop(self) -> None:
        """Take no more connections, and end those that there are."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """`stop`, and wait until nothing is left."""
        self.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            LOG.error("the proxy of a sandbox failed", exc_info=error)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        with self._listener:
            while True:
                await self._places.acquire()
                try:
                    client, _ = await loop.sock_accept(self._listener)
                except OSError as error:  # a connection that is gone already, or no descriptor to be had
                    self._places.release()
                    LOG.warning("the proxy of a sandbox takes no connection: %s", error.strerror)
                    await asyncio.sleep(1)
                    continue
                self._spawn(self._serve(client))
                await asyncio.sleep(PACE)

    async def _serve(self, client: socket.socket) -> None:
        """One connection, to its end; whatever the other two ends do is no error of ours."""
        try:
            async with asyncio.timeout(MOST_SECONDS):
                reader, writer = await asyncio.open_connection(sock=client, limit=HEAD_BYTES)
                try:
                    await self._answer(reader, writer)
                    writer.close()
                    await writer.wait_closed()
                finally:
                    writer.transport.abort()
        except* (OSError, EOFError):
            LOG.debug("a connection of a sandbox ended early", exc_info=True)
        finally:
            client.close()
            self._places.release()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await self._asked(reader)
            there = await self._reached(request.target)
        except RefusedError as refused:
            body = f"{refused.reason}\n".encode()
            head = f"HTTP/1.1 {refused.status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            writer.write_eof()
            # Closed with bytes unread, the connection would be reset, and the answer perhaps not read.
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while await reader.read(CHUNK):
                        pass
            return
        try:
            async with asyncio.timeout(IDLE_SECONDS) as idle:
                await self._relay(request, (reader, writer), there, idle)
        finally:
            there[1].transport.abort()

    async def _asked(self, reader: asyncio.StreamReader) -> Request:
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                return read_head(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError:
            raise RefusedError("431 Request Header Fields Too Large", "the head is too long") from None

    async def _reached(self, target: Target) -> Streams:
        """A connection to what is allowed."""
        host, port = target
        if target not in self._allowed:
            raise RefusedError("403 Forbidden", f"this sandbox may not reach {host}:{port}")
        if self._left <= 0:
            raise RefusedError("403 Forbidden", "this sandbox has used up its limit of network_bytes")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for address in await self._addresses(target):
                    try:
                        return await self._connect(address, port)
                    except OSError:
                        continue
        except TimeoutError:
            raise RefusedError("504 Gateway Timeout", f"{host}:{port} does not answer") from None
        raise RefusedError("502 Bad Gateway", f"{host}:{port} cannot be reached")

    async def _addresses(self, target: Target) -> list[Address]:
        """Those that may be connected to: looked up once, here, and not again."""
        fixed = self._allowed.address_of(target)
        if fixed is not None:
            return [fixed]
        try:
            found = [literal(text) for text in await self._resolve(*target)]
        except (OSError, UnicodeError):
            raise RefusedError("502 Bad Gateway", f"{target[0]} has no address") from None
        public = [each for each in found if each is not None and is_public(each)]
        if not public:
            raise RefusedError("403 Forbidden", f"{target[0]} has no public address")
        return list(dict.fromkeys(public))

    async def _relay(self, request: Request, here: Streams, there: Streams, idle: asyncio.Timeout) -> None:
        """Bytes in both directions, until the other side has no more to say."""
        if request.head:
            there[1].write(request.head)
        else:
            here[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        async with asyncio.TaskGroup() as group:
            most = request.body if request.head else None
            upward = group.create_task(self._copy(here[0], there[1], idle, most))
            await self._copy(there[0], here[1], idle)
            upward.cancel()

    async def _copy(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        idle: asyncio.Timeout,
        most: int | None = None,
    ) -> None:
        """Until the end, which is passed on, or `most` bytes, of which the other side knows.

        Raises:
            EOFError: the sandbox has used up its bytes.
        """
        now = asyncio.get_running_loop().time
        while most is None or most > 0:
            data = await reader.read(CHUNK if most is None else min(CHUNK, most))
            if not data:
                break
            self._left -= len(data)
            if self._left < 0:
                raise EOFError("no bytes are left")
            most = None if most is None else most - len(data)
            writer.write(data)
            await writer.drain()
            if not idle.expired():
                idle.reschedule(now() + IDLE_SECONDS)
        if most is None:
            writer.write_eof()
