"""The driver's side of one worker: every call has a deadline, every death is named and shown."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from k2rl.config import DeadlineConfig
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import EngineDeadError, GenerationError
from k2rl.workers.diagnosis import Diagnostician
from k2rl.workers.process import last_lines
from k2rl.workers.spec import Site

T = TypeVar("T")

SHUTDOWN_DEADLINE_S = 20.0


class WorkerLostError(RunError):
    """A worker died or no longer answers, and its part of the trainer with it."""


class EngineLostError(RunError):
    """A worker's vLLM died or no longer answers."""


class Worker:
    """An actor. Raises `RunError` with the dead part and its last log lines."""

    def __init__(self, actor: Any, rank: int, log_path: Path, deadlines: DeadlineConfig) -> None:
        self.actor = actor
        self.rank = rank
        self.name = f"worker {rank}"
        self._log_path = log_path
        self._deadlines = deadlines
        self._diagnosed = Diagnostician(log_path.parent)
        self.site: Site | None = None
        #: Whether the actor died or no longer answers: nothing more can be asked of it.
        self.lost = False

    async def call(
        self,
        what: str,
        method: str,
        deadline: str,
        *arguments: object,
        late_is_lost: bool = True,
    ) -> Any:
        """The answer of one of its methods.

        Args:
            what: it is doing, for messages.
            method: of `ColocatedWorker`.
            deadline: the field of `DeadlineConfig` that says how long it may take.
            arguments: or references to them in Ray's object store.
            late_is_lost: a worker that misses this deadline is given up.

        Raises:
            WorkerLostError: it died, or is late.
            EngineLostError: its vLLM died.
            RunError, ConfigError, GenerationError: what it raised.
        """
        reference = getattr(self.actor, method).remote(*arguments)
        return await self._await(what, reference, getattr(self._deadlines, deadline), late_is_lost)

    async def heartbeat(self) -> tuple[str, float]:
        """See `ColocatedWorker.heartbeat`; raises as `call`."""
        answer: tuple[str, float] = await self.call("answering heartbeats", "heartbeat", "heartbeat_s")
        return answer

    async def diagnosed(self, what: str) -> str:
        """What every part on its node is doing, to end an error with; see `Diagnostician`."""
        return await self._diagnosed(what, self.site)

    def engine_lost(self, what: str) -> EngineLostError:
        """The error for its vLLM, which `what` (died, hangs …)."""
        return EngineLostError(self._obituary(f"the vLLM engine of {self.name} {what}"))

    async def shutdown(self) -> None:
        """Stop vLLM and the actor; a worker that does not stop in time is killed."""
        if not self.lost:
            with suppress(TimeoutError, RayError):
                await asyncio.wait_for(self.actor.shutdown.remote(), SHUTDOWN_DEADLINE_S)
        self.kill()

    def kill(self) -> None:
        """At once, also if it stands still."""
        self.lost = True
        ray.kill(self.actor)
        site = self.site
        # Where Ray cannot: it asks the process, and that may have been stopped.
        if site is not None and site.node == ray.get_runtime_context().get_node_id():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if "ColocatedWorker" in " ".join(psutil.Process(site.pid).cmdline()):
                    os.kill(site.pid, signal.SIGKILL)

    async def _await(
        self,
        what: str,
        reference: Awaitable[T],
        seconds: float,
        late_is_lost: bool = True,
    ) -> T:
        try:
            return await asyncio.wait_for(reference, seconds)
        # First: what a method of the worker raised is also an instance of its cause, even of TimeoutError.
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineDeadError):
                raise self.engine_lost(f"died while {what}: {' '.join(str(cause).split())}") from None
            if isinstance(cause, (RunError, ConfigError, GenerationError)):
                raise type(cause)(str(cause)) from None
            raise RunError(self._obituary(f"{self.name} failed while {what}: {cause!r}")) from error
        except TimeoutError:
            late = f"hangs: {what} took more than {seconds:g} s"
            self.lost = self.lost or late_is_lost
            kind = WorkerLostError if late_is_lost else RunError
            found = await self.diagnosed(what)
            raise kind(self._obituary(f"{self.name} {late}") + found) from None
        except RayActorError:
            self.lost = True
            raise WorkerLostError(self._obituary(f"{self.name} died while {what}")) from None
        except RayError as error:
            self.lost = True
            reason = " ".join(str(error).split())
            raise WorkerLostError(
                self._obituary(f"{self.name} was lost while {what}: {type(error).__name__}: {reason}")
            ) from error

    def _obituary(self, what: str) -> str:
        lines = last_lines(self._log_path)
        return f"{what}; last lines of {self._log_path}:\n{lines}" if lines else what
