"""Environments served by the real OpenEnv, which has a Python of its own: it asks for another `mcp`."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
import venv
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import envs
from envs.base import maybe_await
from k2rl.authoring.check import Settings, check
from k2rl.errors import ConfigError

VERSION = "0.10.0"
SERVER = Path(__file__).with_name("openenv_server.py")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("openenv")
    venv.EnvBuilder(symlinks=True, with_pip=True).create(folder)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-qq", f"openenv=={VERSION}"], check=True, timeout=800)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([python, SERVER, str(port)])
    deadline = time.monotonic() + 300
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_served_game_is_played_and_passes_the_check(url: str) -> None:
    async def guess(task: Any) -> float:
        env = envs.make("openenv", url=url, observation_field="text")
        messages, _ = await maybe_await(env.reset(options={"task": task}))
        assert messages[0].content == "Guess my number between 1 and 50."
        low, high = 1, 50
        while True:
            number = (low + high) // 2
            messages, reward, terminated, _, _ = await maybe_await(env.step(str(number)))
            if terminated:
                await maybe_await(env.close())
                return reward
            low, high = (number + 1, high) if messages[0].content == "higher" else (low, number - 1)

    async def play() -> list[float]:
        tasks = islice(envs.make("openenv").tasks("train", 0), 6)
        return list(await asyncio.gather(*(guess(task) for task in tasks)))

    assert asyncio.run(play()) == [1.0] * 6
    findings = asyncio.run(check("openenv", {"url": url}, Settings(tasks=2)))
    assert [finding for finding in findings if finding.status == "FAULT"] == []


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="url='here' is no address"):
        envs.make("openenv", url="here")

    async def reset() -> None:
        env = envs.make("openenv", url="http://127.0.0.1:9")
        try:
            await maybe_await(env.reset(seed=0))
        finally:
            await maybe_await(env.close())

    with pytest.raises(OSError, match="127.0.0.1:9"):
        asyncio.run(reset())
