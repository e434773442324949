"""What servers have in common that lend things of this machine over HTTP: who may ask, leases, their end.

Whoever has the token may borrow what the server lends and nothing else, and what was lent is taken back when
its borrower has not been heard of for a lease.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
from aiohttp import web

from sandboxes import wire
from sandboxes.base import MIB

T = TypeVar("T")

LOG = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class LendingOptions:
    """Where a server listens, whom it answers, and for how long it lends.

    Raises:
        ValueError: it would serve everybody, or a number makes no sense.
    """

    host: str = "127.0.0.1"
    #: 0: any that is free.
    port: int = 0
    #: What a client must show. None is for loopback only, where whoever has an account may use the server.
    token: str | None = None
    #: Seconds after which that is taken back whose client is not heard of.
    lease: float = 60.0
    #: Bytes of a request.
    body_bytes: int = 320 * MIB
    #: Most that is lent at once.
    capacity: int = 64

    what: ClassVar[str] = "server"
    does: ClassVar[str] = "works for"
    token_variable: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.token is None and self.host not in LOOPBACK:
            raise ValueError(
                f"{self.what} on {self.host} {self.does} whoever reaches it: give it a token "
                f"(--token-file, or {self.token_variable}), or bind it to 127.0.0.1"
            )
        if self.token is not None and len(self.token) < 16:
            raise ValueError(f"the token of {self.what} is shorter than 16 characters: take a random one")
        if self.capacity < 1 or self.lease <= 0 or self.body_bytes < 1:
            raise ValueError(f"capacity, lease and body_bytes of {self.what} must be positive")


@dataclass
class _Lent(Generic[T]):
    thing: T
    expires: float


class LendingServer(ABC, Generic[T]):
    """Lends things of one sort. It belongs to one event loop."""

    #: What one of them is called, and several.
    noun: ClassVar[str]
    nouns: ClassVar[str]

    def __init__(self, options: LendingOptions) -> None:
        self._terms = options
        self._lent: dict[str, _Lent[T]] = {}
        self._making: set[asyncio.Task[Any]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._runner: web.AppRunner | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.url = ""

    @abstractmethod
    def add_routes(self, router: web.UrlDispatcher) -> None:
        """What can be asked beside `/health` and `/v1/renew`."""

    @abstractmethod
    async def close_thing(self, thing: T) -> None:
        """Put away what nobody has any more; what goes wrong is for the log."""

    @abstractmethod
    def health(self) -> dict[str, Any]:
        """What there is to say to those who have no token."""

    @abstractmethod
    def fault_of(self, error: Exception) -> wire.Fault | None:
        """What the client is told of an error; None if it is a bug of ours."""

    async def start(self) -> str:
        """Listen; returns the server's address.

        Raises:
            OSError: the address cannot be bound.
        """
        app = web.Application(
            client_max_size=self._terms.body_bytes, middlewares=[self._guard, self._report_faults]
        )
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/renew", self._renew)
        self.add_routes(app.router)
        # A client that goes away takes its call with it.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._terms.host, self._terms.port)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._sweeper = asyncio.create_task(self._sweep())
        return self.url

    async def stop(self) -> None:
        """Stop listening, and lend no more; what is lent is the subclass's to close."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        for task in self._making:
            task.cancel()

    @property
    def full(self) -> bool:
        return len(self._lent) + len(self._making) >= self._terms.capacity

    async def lend(self, make: Coroutine[Any, Any, tuple[T, Any]]) -> tuple[str, Any]:
        """Make a thing and lend it: its id, and what else `make` gave.

        If the client goes away meanwhile nobody renews what was made for it, and the lease ends.
        """

        async def work() -> tuple[str, Any]:
            thing, rest = await make
            id = secrets.token_urlsafe(16)
            self._lent[id] = _Lent(thing, time.monotonic() + self._terms.lease)
            return id, rest

        making = asyncio.create_task(work())
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        return await asyncio.shield(making)

    def lent(self, id: str) -> T | None:
        """A thing, whose lease is extended; None: there is no such one."""
        lent = self._lent.get(id)
        if lent is None:
            return None
        lent.expires = time.monotonic() + self._terms.lease
        return lent.thing

    async def take_back(self, id: str) -> None:
        """Close it, to the end even if nobody waits for it."""
        lent = self._lent.pop(id, None)
        if lent is None:
            return
        closing = asyncio.create_task(self.close_thing(lent.thing))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    def gone(self, id: str) -> web.Response:
        """The answer to a client whose thing is not there."""
        why = f"there is no {self.noun} {id[:6]}…: closed, its lease ended, or the server is a new one"
        return fault_response(wire.Fault(kind="closed", message=why))

    def all_lent(self) -> web.Response:
        """The answer to a client for whom there is no room."""
        why = f"all {self._terms.capacity} {self.nouns} are open"
        return fault_response(wire.Fault(kind="full", message=why))

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Who may ask at all; before a byte of the body is read."""
        token = self._terms.token
        if token is None:
            # Web pages in a browser of this machine reach loopback, too: by a name of their own, or without
            # a content type that a browser would ask leave for.
            if request.url.host not in LOOPBACK:
                return _refuse(403, "this server has no token and answers to loopback's names only")
        elif request.path != "/health":
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, f"Bearer {token}".encode()):
                variable = self._terms.token_variable
                return _refuse(401, f"wrong or missing token (the client takes it from {variable})")
        if request.method == "POST" and request.content_type != wire.CONTENT_TYPE:
            return _refuse(415, f"the body must be {wire.CONTENT_TYPE}")
        return await handler(request)

    @web.middleware
    async def _report_faults(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors as the client needs them. Bugs of ours are logged with their traceback and told as what they
        are."""
        try:
            return await handler(request)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return _refuse(400, f"not a request that this server knows: {error}")
        except web.HTTPException:
            raise
        except Exception as error:
            fault = self.fault_of(error)
            if fault is None:
                raise
            return fault_response(fault)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"ok": True, **self.health()})

    async def _renew(self, request: web.Request) -> web.Response:
        renew = msgspec.msgpack.decode(await request.read(), type=wire.Renew)
        unknown = [id for id in renew.ids if self.lent(id) is None]
        return answer(wire.Renewed(unknown=unknown, load=self.load()))

    def load(self) -> wire.Load:
        return wire.Load(open=len(self._lent) + len(self._making), capacity=self._terms.capacity)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._terms.lease / 4)
            expired = [id for id, lent in self._lent.items() if lent.expires < time.monotonic()]
            for id in expired:
                LOG.warning("%s %s is closed: its client was not heard of", self.noun, id[:6])
                await self.take_back(id)


def answer(value: Any) -> web.Response:
    """A body of msgpack."""
    return web.Response(body=msgspec.msgpack.encode(value), content_type=wire.CONTENT_TYPE)


def fault_response(fault: wire.Fault, status: int | None = None) -> web.Response:
    response = answer(fault)
    response.set_status(wire.STATUS[fault.kind] if status is None else status)
    return response


def _refuse(status: int, message: str) -> web.Response:
    """Refuse a request for what it is; a client of ours raises its error."""
    return fault_response(wire.Fault(kind="failed", message=message), status)
