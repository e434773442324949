"""A service until a signal ends it, and several of them in processes of their own."""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence

from envs.base import TextEnv
from k2rl.errors import RunError
from k2rl.serving.server import EnvironmentServer, ServiceOptions
from sandboxes.serving import ended_by_signal

STOP_SECONDS = 45.0
"""What a service gets to close its environments."""
PAUSE_SECONDS = 1.0
"""Before a dead service is started again."""
EARLY_DEATHS = 3
"""Services that never came to listen, one after the other, after which there is no sense in another."""


async def serve(
    id: str,
    make_env: Callable[[], TextEnv],
    options: ServiceOptions,
    say: Callable[[str], None],
    ends_with_stdin: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM, or until nobody holds the other end of standard input.

    Args:
        id: what the environment is called.
        make_env: makes one for each episode.
        options: how it is served.
        say: gets a line once the service listens, with its address.
        ends_with_stdin: whether that end counts.

    Raises:
        OSError: the address cannot be bound.
    """
    server = EnvironmentServer(id, make_env, options)
    try:
        ended = ended_by_signal()
        if ends_with_stdin:
            _set_at_end(ended, sys.stdin.fileno())
        say(f"{id} at {await server.start()}")
        await ended.wait()
    finally:
        await server.stop()


def _set_at_end(ended: asyncio.Event, descriptor: int) -> None:
    loop = asyncio.get_running_loop()

    def read() -> None:
        if not os.read(descriptor, 1):
            # What has ended stays readable, and would be read again and again while the service closes.
            loop.remove_reader(descriptor)
            ended.set()

    loop.add_reader(descriptor, read)


async def serve_in_processes(commands: Sequence[Sequence[str]], say: Callable[[str], None]) -> None:
    """Run services, and run those again that die, until SIGINT or SIGTERM.

    Raises:
        RunError: one dies before it listens, again and again.
    """
    ended = ended_by_signal()
    keeping = [asyncio.ensure_future(_kept(command, ended, say)) for command in commands]
    await asyncio.wait(keeping, return_when=asyncio.FIRST_EXCEPTION)
    ended.set()
    await asyncio.wait(keeping)
    for kept in keeping:
        kept.result()


async def _kept(command: Sequence[str], ended: asyncio.Event, say: Callable[[str], None]) -> None:
    early = 0
    while not ended.is_set():
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        assert process.stdout is not None
        over = asyncio.ensure_future(ended.wait())
        try:
            line = asyncio.ensure_future(process.stdout.readline())
            await asyncio.wait({line, over}, return_when=asyncio.FIRST_COMPLETED)
            if line.done() and (said := line.result().decode().strip()):
                early = 0
                say(said)
            elif line.done():
                early += 1
            line.cancel()
            dead = asyncio.ensure_future(process.wait())
            await asyncio.wait({dead, over}, return_when=asyncio.FIRST_COMPLETED)
            if ended.is_set():
                return
            if early >= EARLY_DEATHS:
                raise RunError(f"a service dies before it listens (exit code {process.returncode})")
            say(f"a service has died (exit code {process.returncode}) and is started again")
        finally:
            over.cancel()
            await _stop(process)
        await asyncio.sleep(PAUSE_SECONDS)


async def _stop(process: Process) -> None:
    """A service sees its standard input end, and closes its environments."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
