"""An MCP server for tests: `python mcp_shop.py` over stdio, with a port over HTTP."""

import asyncio
import os
import sys

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shop")


@server.tool()
def price(name: str, number: int = 1) -> str:
    """What so many pieces cost, in cents."""
    if name not in ("tea", "milk"):
        raise ToolError(f"there is no {name}")
    return str({"tea": 330, "milk": 120}[name] * number)


@server.tool()
async def wait() -> str:
    """Never answers."""
    await asyncio.Event().wait()
    return ""


@server.tool()
def leave() -> str:
    """Ends the server."""
    os._exit(3)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
