"""Tools of MCP servers: a command that speaks over its standard streams, or an address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from envs.tools.tool import TIMEOUT_S, Tool, ToolError
from k2rl.errors import ConfigError
from k2rl.types import ToolSpec

CONNECT_S = 30.0


class MCPServer:
    """A connection to an MCP server, whose tools an environment can offer.

        server = await MCPServer.open("http://127.0.0.1:8000/mcp")
        self.use_tools([*self.own_tools(), *server.tools])

    To be closed where it was opened: in the environment's `close`.
    """

    def __init__(self, tools: Sequence[Tool], stop: asyncio.Event, owner: asyncio.Task[None]) -> None:
        self.tools = tuple(tools)
        self._stop, self._owner = stop, owner

    @classmethod
    async def open(
        cls,
        server: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
        connect_s: float = CONNECT_S,
    ) -> MCPServer:
        """Connect to a server: an address (streamable HTTP), or a command with its arguments (stdio).

        `env` is added to the few variables that a command gets; `timeout_s` is for each call of a tool.

        Raises:
            ConfigError: the package `mcp` is not installed.
            TimeoutError: the server did not answer within `connect_s`.
            Exception: whatever the connection fails with.
        """
        try:
            import mcp
        except ImportError as error:
            raise ConfigError(f"tools of MCP servers need: pip install 'k2rl[mcp]' ({error})") from error
        target: Any = server
        if not isinstance(server, str):
            variables = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
            target = mcp.StdioServerParameters(
                command=server[0], args=list(server[1:]), env={**variables, **(env or {})}
            )
        ready: asyncio.Future[list[Tool]] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        # The client must be left by the task that entered it; an environment's calls are tasks of their own.
        owner = asyncio.create_task(_own(mcp.Client(target), ready, stop, timeout_s))
        await asyncio.wait({ready, owner}, timeout=connect_s, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            owner.cancel()
            with suppress(asyncio.CancelledError):
                await owner
            raise TimeoutError(f"the MCP server {server} did not answer within {connect_s:g} s")
        return cls(ready.result(), stop, owner)

    async def close(self) -> None:
        """End the connection, and the command if there is one."""
        self._stop.set()
        await self._owner


async def _own(client: Any, ready: asyncio.Future[list[Tool]], stop: asyncio.Event, timeout_s: float) -> None:
    """Hold a connection open until it is to stop; its tools, or why there are none, go to `ready`."""
    try:
        async with client:
            ready.set_result(await _tools(client, timeout_s))
            await stop.wait()
    except Exception as error:
        if ready.done():
            raise
        ready.set_exception(error)


async def _tools(client: Any, timeout_s: float) -> list[Tool]:
    tools, cursor = [], None
    while True:
        page = await client.list_tools(cursor=cursor)
        tools += [_tool(client, found, timeout_s) for found in page.tools]
        cursor = page.next_cursor
        if cursor is None:
            return tools


def _tool(client: Any, found: Any, timeout_s: float) -> Tool:
    async def use(**arguments: Any) -> str:
        result = await client.call_tool(found.name, arguments)
        text = "\n".join(_text(content) for content in result.content)
        if result.is_error:
            raise ToolError(text or "the tool failed")
        return text

    spec = ToolSpec(found.name, found.description or "", dict(found.input_schema))
    return Tool(spec, use, None, timeout_s)


def _text(content: Any) -> str:
    """What a policy that reads text sees of a result's part."""
    return str(content.text) if content.type == "text" else f"[{content.type}]"
