"""Tools of a real MCP server, over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.tools import ToolEnv, calling
from envs.tools.formats import Call, written
from envs.tools.mcp import MCPServer
from envs.tools.toolbox import Toolbox
from k2rl.types import Message, Task
from tests.envs.conftest import play_async

SHOP = Path(__file__).with_name("mcp_shop.py")
STDIO = [sys.executable, str(SHOP)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([*STDIO, str(port)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


class ShopEnv(ToolEnv):
    """Buy tea."""

    server: MCPServer | None = None

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target

    def tasks(self, split: Any, seed: int) -> Any:
        yield Task("shop/0", "shop", "default", split, 0)

    async def begin(self, task: Task) -> Any:  # type: ignore[override]
        self.server = await MCPServer.open(self.target, timeout_s=60.0, connect_s=120.0)
        self.use_tools(self.server.tools)
        return (Message("user", "What does tea cost?"),)

    def answer(self, text: str) -> Any:
        return self.end(float("660" in text))

    async def close(self) -> None:  # type: ignore[override]
        if self.server is not None:
            await self.server.close()


@pytest.mark.parametrize("over", ["stdio", "http"])
def test_an_environment_with_a_servers_tools(over: str, address: str) -> None:
    async def run() -> Any:
        env = ShopEnv(STDIO if over == "stdio" else address)
        turns = [
            calling("price", 0, name="tea", number=2),
            calling("price", 1, name="gold"),
            calling("price", 2, number="many"),
            "660",
        ]
        try:
            return await play_async(env, next(env.tasks("train", 0)), [written(t) for t in turns]), env.tools
        finally:
            await env.close()

    episode, tools = asyncio.run(run())
    price = next(tool for tool in tools if tool.name == "price")
    assert price.description == "What so many pieces cost, in cents."
    assert price.parameters["properties"]["number"]["type"] == "integer"
    said = [message.content for message in episode.messages[1:]]
    assert said[0] == "660"
    assert said[1].startswith("error: ")
    assert "there is no gold" in said[1]
    assert said[2].startswith("error: ")
    assert episode.reward == 1.0
    assert episode.components == {"calls": 3.0, "bad_calls": 2.0}


def test_a_call_that_hangs_and_a_server_that_dies() -> None:
    async def run() -> None:
        server = await MCPServer.open(STDIO, timeout_s=0.5, connect_s=120.0)
        late = await Toolbox(server.tools).run([Call("wait")])
        assert late.messages[0].content == "error: wait gave no answer within 0.5 s"
        await server.close()
        server = await MCPServer.open(STDIO, timeout_s=60.0, connect_s=120.0)
        with pytest.raises(Exception, match="(?i)clos"):
            await Toolbox(server.tools).run([Call("leave")])
        await server.close()

    asyncio.run(run())


def test_a_server_that_is_none() -> None:
    async def run(target: Any, **options: Any) -> None:
        await MCPServer.open(target, **options)

    with pytest.raises(Exception, match=r".") as caught:
        asyncio.run(run("http://127.0.0.1:9/mcp"))
    assert not isinstance(caught.value, AssertionError)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.2 s"):
        asyncio.run(run(["sleep", "100"], connect_s=0.2))
