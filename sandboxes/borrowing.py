"""The other side of `lending.py`: calls with deadlines, and a heartbeat that keeps what is borrowed ours.

With several servers, the next thing is borrowed from the one that has most room. A server that no longer
answers fails what is borrowed from it, by name, and is left out until it answers again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import msgspec

from sandboxes import wire

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

CONNECT_SECONDS = 10.0


class Borrowed(Protocol):
    """A thing of a server's."""

    def lost(self, why: str) -> None:
        """It is gone; what is asked of it from now on fails. It calls `Lender.given_back`."""
        ...

    async def close(self) -> None: ...


L = TypeVar("L", bound=Borrowed)


class PassOverError(Exception):
    """This server cannot lend now, another may."""

    def __init__(self, message: str, full: bool) -> None:
        super().__init__(message)
        self.full = full


class Lender(Generic[L]):
    """The connection to one server. It belongs to one event loop."""

    #: What such a server is called.
    noun: ClassVar[str]
    #: What is raised: in general, where it does not answer, and where it has no room.
    error: ClassVar[type[Exception]]
    unreachable: ClassVar[type[Exception]]
    full: ClassVar[type[Exception]]

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._headers = {"Content-Type": wire.CONTENT_TYPE}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._session: aiohttp.ClientSession | None = None
        self._heart: asyncio.Task[None] | None = None
        self._load = wire.Load(open=0, capacity=1)
        #: Why it was passed over last time; None: it answered.
        self._down: str | None = None
        self._lost: str | None = None
        self._waiting: set[asyncio.Timeout] = set()
        self.borrowed: dict[str, L] = {}

    def error_of(self, fault: wire.Fault) -> Exception:
        """What the client raises for a fault."""
        return self.error(f"{fault.message} ({self.noun} {self.url})")

    @property
    def crowding(self) -> tuple[bool, float]:
        """What orders servers by who should lend the next thing."""
        known = max(self._load.open, len(self.borrowed))
        return self._down is not None, known / self._load.capacity

    async def borrow(self, asking: Awaitable[T], take: Callable[[T], tuple[str, L, float]]) -> L:
        """Ask for a thing; `take` makes it of the answer: its id, itself, its lease in seconds.

        Raises:
            PassOverError: the server is full or does not answer.
        """
        try:
            answer = await asking
        except self.full as error:
            self._load = wire.Load(open=self._load.capacity, capacity=self._load.capacity)
            raise PassOverError(str(error), full=True) from None
        except self.unreachable as error:
            self._down = str(error)
            raise PassOverError(str(error), full=False) from None
        self._down = None
        id, thing, lease = take(answer)
        self.borrowed[id] = thing
        self._load = wire.Load(open=self._load.open + 1, capacity=self._load.capacity)
        if self._heart is None or self._heart.done():
            self._lost = None
            self._heart = asyncio.create_task(self._beat(lease))
        return thing

    def given_back(self, id: str) -> None:
        self.borrowed.pop(id, None)

    async def ask(
        self, method: str, path: str, body: Any, answer: type[T], seconds: float, *, beat: bool = False
    ) -> T:
        """One request.

        Raises:
            Exception: `unreachable` if the server does not answer, or not in time; what `error_of` makes of a
                fault; `error` where it is no such server.
        """
        import aiohttp  # here, so that environments can be listed where it is not installed

        session = self._session
        if session is None or session.closed:
            # Connections idle for longer than a few seconds are not used again: the server may be closing
            # them.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=10.0)
            session = aiohttp.ClientSession(headers=self._headers, connector=connector)
            self._session = session
        no_limit = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        try:
            async with asyncio.timeout(seconds) as deadline:
                if not beat:
                    self._waiting.add(deadline)
                try:
                    data = None if body is None else msgspec.msgpack.encode(body)
                    async with session.request(
                        method, self.url + path, data=data, timeout=no_limit, allow_redirects=False
                    ) as reply:
                        content, status = await reply.read(), reply.status
                        kind = reply.content_type
                finally:
                    self._waiting.discard(deadline)
        except TimeoutError:
            why = self._lost or f"{self.noun} {self.url} did not answer within {seconds:g} s"
            raise self.unreachable(why) from None
        except aiohttp.ClientError as error:
            raise self.unreachable(
                f"{self.noun} {self.url} is gone: {error or type(error).__name__}"
            ) from None
        return self._read(content, status, kind, answer)

    def _read(self, content: bytes, status: int, kind: str, answer: type[T]) -> T:
        try:
            if status == 200 and kind == wire.CONTENT_TYPE:
                return msgspec.msgpack.decode(content, type=answer)
            if kind == wire.CONTENT_TYPE:
                fault = msgspec.msgpack.decode(content, type=wire.Fault)
                if fault.kind == "full":
                    raise self.full(f"{self.url}: {fault.message}")
                raise self.error_of(fault)
        except msgspec.MsgspecError as error:
            raise self.error(f"{self.noun} {self.url} sent what no such server sends: {error}") from None
        if status == 413:
            raise self.error(f"{self.noun} {self.url}: the request is larger than it takes (--body-mib)")
        raise self.error(f"what answers at {self.url} is no {self.noun}: HTTP status {status}, {kind}")

    async def _beat(self, lease: float) -> None:
        """Renew the leases, until there is nothing left to renew or the server is lost."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while self.borrowed:
            await asyncio.sleep(lease / 4)
            renew = wire.Renew(ids=list(self.borrowed))
            try:
                renewed = await self.ask("POST", "/v1/renew", renew, wire.Renewed, lease / 2, beat=True)
            except self.error as error:
                if loop.time() - heard > lease:
                    self._lose(f"{self.noun} {self.url} was not heard of for {lease:g} s: {error}")
                continue
            heard, self._load = loop.time(), renewed.load
            for id in renewed.unknown:
                if id in self.borrowed:
                    self.borrowed[id].lost(f"{self.noun} {self.url} has closed it or is a new one")

    def _lose(self, why: str) -> None:
        """What the server has lent is gone: fail what waits for it."""
        self._lost = self._down = why
        now = asyncio.get_running_loop().time()
        for deadline in self._waiting:
            deadline.reschedule(now)
        for thing in list(self.borrowed.values()):
            thing.lost(why)

    async def close(self) -> None:
        """Give everything back. It can be used again."""
        await asyncio.gather(*(thing.close() for thing in list(self.borrowed.values())))
        if self._heart is not None:
            self._heart.cancel()
        session, self._session = self._session, None
        if session is not None:
            await session.close()


S = TypeVar("S", bound=Lender[Any])


async def borrow_anywhere(
    servers: Sequence[S],
    borrow: Callable[[S], Awaitable[T]],
    seconds: float,
    error: type[Exception],
    unavailable: type[Exception],
) -> T:
    """Borrow from the server that has most room, waiting `seconds` for room if all are full.

    Raises:
        Exception: `unavailable` if none answers, `error` if none has room in time, and what `borrow` raises.
    """
    noun = servers[0].noun
    loop = asyncio.get_running_loop()
    deadline, pause = loop.time() + seconds, 0.05
    while True:
        faults = []
        for server in sorted(servers, key=lambda server: server.crowding):
            try:
                return await borrow(server)
            except PassOverError as fault:
                faults.append(fault)
        why = "; ".join(str(fault) for fault in faults)
        if not any(fault.full for fault in faults):
            raise unavailable(f"no {noun} answers: {why}")
        if loop.time() + pause > deadline:
            raise error(f"no {noun} had room within {seconds:g} s: {why}")
        await asyncio.sleep(pause)
        pause = min(2 * pause, 2.0)


def checked_urls(urls: Sequence[str] | str, noun: str) -> list[str]:
    """Addresses of servers, each once, without a slash at the end.

    Raises:
        ValueError: one is no address.
    """
    urls = [urls] if isinstance(urls, str) else urls
    for url in urls:
        if not str(url).startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of {noun}: http://host:port")
    return list(dict.fromkeys(url.rstrip("/") for url in urls))
