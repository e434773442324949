"""docker's SDK, whose calls block, for coroutines: on threads of their own, with deadlines and named
errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import docker
import docker.errors
import requests

from sandboxes.errors import SandboxError, SandboxUnavailableError

T = TypeVar("T")

CALL_SECONDS = 60.0
THREADS = 16


class Daemon:
    """The docker daemon that DOCKER_HOST names, or that of this machine."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="docker")
        self._client: docker.DockerClient | None = None

    async def call(
        self, what: str, function: Callable[[docker.DockerClient], T], seconds: float = CALL_SECONDS
    ) -> T:
        """Run `function` with the client in a thread.

        Args:
            what: what it does, for the message if it fails: "starting a container".

        Raises:
            SandboxUnavailableError: no daemon answers, or it does not let us.
            SandboxError: the daemon refused, went away or did not answer in time.
            docker.errors.NotFound: there is no such image or container.
        """
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._run, what, function)
        # Whoever waits may be gone when it fails.
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            # A thread cannot be ended, but what it waits for can: the client's own time-out is shorter.
            return await asyncio.wait_for(asyncio.shield(work), seconds + 5)
        except TimeoutError:
            raise SandboxError(f"{what}: docker's daemon did not answer within {seconds:g} s") from None

    def _run(self, what: str, function: Callable[[docker.DockerClient], T]) -> T:
        try:
            return function(self._connected())
        except docker.errors.NotFound:
            raise
        except docker.errors.APIError as error:
            raise SandboxError(f"{what}: docker's daemon refuses: {error.explanation or error}") from None
        except requests.exceptions.Timeout:
            raise SandboxError(f"{what}: docker's daemon did not answer in time") from None
        except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
            raise SandboxError(f"{what}: docker's daemon went away: {error}") from None

    def _connected(self) -> docker.DockerClient:
        if self._client is None:
            self._client = connect(CALL_SECONDS)
        return self._client

    def close(self) -> None:
        """Let go of connections and threads; nothing on them is waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()


def connect(seconds: float) -> docker.DockerClient:
    """A client whose calls end after so many seconds.

    Raises:
        SandboxUnavailableError: no daemon answers, or it does not let us.
    """
    try:
        return docker.DockerClient.from_env(timeout=int(seconds), max_pool_size=THREADS)
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        where = os.environ.get("DOCKER_HOST", "/var/run/docker.sock")
        raise SandboxUnavailableError(
            f"no docker daemon answers at {where}: {_cause(error)}. Install docker and start it "
            "(Debian: apt install docker.io), and be root or a member of the group docker"
        ) from None


def _cause(error: BaseException) -> str:
    """The innermost reason: requests and docker wrap an OSError several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
