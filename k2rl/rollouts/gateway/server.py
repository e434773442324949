"""The HTTP around sessions. The key that a client shows says which episode it speaks for."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

from k2rl.config import GatewayConfig
from k2rl.errors import RunError
from k2rl.inference.engine import InferenceEngine
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Attempt, EpisodeLimits
from k2rl.rollouts.gateway import wire
from k2rl.rollouts.gateway.session import Asked, Session

logger = logging.getLogger(__name__)

PING_S = 10.0
"""Seconds between signs of life in a stream while its turn is drawn."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """The run's endpoint: an async context manager, of one event loop. It serves while sessions are open."""

    def __init__(self, config: GatewayConfig | None = None) -> None:
        self._config = config or GatewayConfig()
        self._sessions: dict[str, Session] = {}
        self._runner: web.AppRunner | None = None
        #: What agents are told: it ends in `/v1`.
        self.url = ""

    async def __aenter__(self) -> Self:
        """Raises:
        RunError: the address cannot be bound.
        """
        app = web.Application(client_max_size=self._config.body_mib * 2**20, middlewares=[_as_openai_does])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._complete)
        # A client that goes away takes its turn with it.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._config.host, self._config.port).start()
        except OSError as error:
            await self._runner.cleanup()
            where = f"gateway.host={self._config.host} gateway.port={self._config.port}"
            raise RunError(f"{where}: {error.strerror or error}") from error
        host, port = self._runner.addresses[0][:2]
        host = f"[{host}]" if ":" in host else host
        self.url = (self._config.url or f"http://{host}:{port}/v1").rstrip("/")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sessions.clear()
        assert self._runner is not None
        await self._runner.cleanup()

    @contextmanager
    def session(
        self, attempt: Attempt, engine: InferenceEngine, chat: ChatTemplate, limits: EpisodeLimits
    ) -> Iterator[Session]:
        """A session for one episode; with it its key ends."""
        session = Session(attempt, engine, chat, limits)
        self._sessions[session.key] = session
        try:
            yield session
        finally:
            self._sessions.pop(session.key, None)

    def _session(self, request: web.Request) -> Session:
        """Found by a key that nobody can guess, on any interface.

        Raises:
            RefusedError: it shows none, or one of no episode that is under way.
        """
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        session = self._sessions.get(key.strip()) if kind.lower() == "bearer" else None
        if session is None:
            raise wire.RefusedError(401, "wrong or missing key, or its episode is over", "invalid_api_key")
        return session

    async def _models(self, request: web.Request) -> web.Response:
        self._session(request)
        model = {"id": "policy", "object": "model", "created": 0, "owned_by": "k2rl"}
        return web.json_response({"object": "list", "data": [model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        asked = session.ask(wire.read_request(await request.read()))
        id = f"chatcmpl-{secrets.token_urlsafe(12)}"
        if asked.request.stream:
            return await _stream(request, session, asked, id)
        return _json(wire.completion(await session.sample(asked), asked.request, id))


async def _stream(request: web.Request, session: Session, asked: Asked, id: str) -> web.StreamResponse:
    """Server-sent events; a failure after the head is told as an event, as OpenAI does."""
    turn = asyncio.create_task(session.sample(asked))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    try:
        await response.prepare(request)
        while not (await asyncio.wait({turn}, timeout=PING_S))[0]:
            await response.write(b": the turn is being drawn\n\n")
        try:
            events = [*wire.chunks(turn.result(), asked.request, id)]
        except Exception as error:  # the episode fails with it: see Session.failed
            logger.warning("a turn of an agent failed", exc_info=error)
            events = [wire.error(_of_engine(error))]
        for event in events:
            await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    finally:
        turn.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait({turn})
    return response


@web.middleware
async def _as_openai_does(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever goes wrong, as clients of OpenAI's API expect to be told."""
    try:
        return await handler(request)
    except wire.RefusedError as error:
        return _refuse(error)
    except web.HTTPRequestEntityTooLarge as error:
        return _refuse(wire.RefusedError(413, f"the request is larger than gateway.body_mib: {error.text}"))
    except web.HTTPException as error:
        return _refuse(wire.RefusedError(error.status, f"{request.method} {request.path}: {error.reason}"))
    except Exception as error:
        logger.warning("a request of an agent failed", exc_info=error)
        return _refuse(_of_engine(error))


def _of_engine(error: Exception) -> wire.RefusedError:
    # Not 5xx: clients would ask again, and there is nobody to answer.
    return wire.RefusedError(
        400, f"the policy gave no turn: {type(error).__name__}: {error}", "policy_failed"
    )


def _refuse(error: wire.RefusedError) -> web.Response:
    response = _json(wire.error(error))
    response.set_status(error.status)
    return response


def _json(value: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
