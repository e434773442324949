"""The driver's side of a worker: every call has a deadline, every death is named and shown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from k2rl.config import Config, DeadlineConfig
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import EngineDeadError, Generation, GenerationError, Sampling
from k2rl.training.batch import SupervisedSequence, TrainSequence
from k2rl.workers.colocated import WorkerSpec, create_actor
from k2rl.workers.process import last_lines

T = TypeVar("T")

HEARTBEAT_INTERVAL_S = 2.0
HEARTBEAT_DEADLINE_S = 60.0
SHUTDOWN_DEADLINE_S = 20.0


class Worker:
    """A started colocated worker. Raises `RunError` with the dead part and its last log lines."""

    def __init__(self, actor: Any, name: str, log_path: Path, deadlines: DeadlineConfig) -> None:
        self._actor = actor
        self._name = name
        self._log_path = log_path
        self._deadlines = deadlines
        #: What trainer and vLLM compute in; known once started.
        self.dtype = ""

    @classmethod
    async def start(cls, config: Config, spec: WorkerSpec) -> Worker:
        """Place the actor in Ray and start its engines.

        Raises:
            RunError: it did not start in time, or died.
        """
        resources = ray.cluster_resources()
        cpus = config.cluster.cpus_per_worker or resources.get("CPU", 1)
        if config.cluster.gpus_per_worker > resources.get("GPU", 0):
            raise ConfigError(
                f"cluster.gpus_per_worker={config.cluster.gpus_per_worker:g}, but the Ray cluster has "
                f"{resources.get('GPU', 0):g} GPUs"
            )
        actor = create_actor(spec, cpus, config.cluster.gpus_per_worker)
        worker = cls(actor, "worker 0", Path(spec.log_path), config.deadlines)
        try:
            worker.dtype = await worker._call("starting", actor.start.remote(), "start_s")
        except BaseException:
            ray.kill(actor)
            raise
        return worker

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """See `InferenceEngine.generate`."""
        return await self._call("generating", self._actor.generate.remote(prompt_ids, sampling), "generate_s")

    async def policy_step(
        self,
        groups: Sequence[Sequence[TrainSequence]],
        config: Config,
        temperature: float,
        ptx_sequences: Sequence[SupervisedSequence],
        num_sequences: int,
    ) -> dict[str, float]:
        """See `TrainEngine.policy_step`."""
        reference = self._actor.policy_step.remote(
            groups,
            config.objective,
            temperature,
            ptx_sequences,
            config.ptx.weight,
            config.train.updates_per_step,
            num_sequences,
        )
        return await self._call("training", reference, "train_s")

    async def sft_step(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        return await self._call("warm start", self._actor.sft_step.remote(sequences), "train_s")

    async def reset_optimizer(self, lr: float) -> None:
        await self._call("resetting the optimizer", self._actor.reset_optimizer.remote(lr), "train_s")

    async def publish(self) -> dict[str, float]:
        return await self._call("publishing weights", self._actor.publish.remote(), "publish_s")

    async def logprob_gap(self, prompts: Sequence[list[int]], max_tokens: int, seed: int) -> dict[str, float]:
        reference = self._actor.logprob_gap.remote(prompts, max_tokens, seed)
        return await self._call("comparing log-probs", reference, "generate_s")

    async def save(self, folder: Path) -> None:
        await self._call("saving a checkpoint", self._actor.save.remote(str(folder)), "checkpoint_s")

    async def load(self, folder: Path) -> None:
        await self._call("loading a checkpoint", self._actor.load.remote(str(folder)), "checkpoint_s")

    async def save_pretrained(self, folder: Path) -> None:
        await self._call("saving the model", self._actor.save_pretrained.remote(str(folder)), "checkpoint_s")

    async def watch(self) -> None:
        """Heartbeats without end.

        Raises:
            RunError: the worker or its vLLM died, or does not answer.
        """
        while True:
            await self._await("answering heartbeats", self._actor.heartbeat.remote(), HEARTBEAT_DEADLINE_S)
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def shutdown(self) -> None:
        """Stop vLLM and the actor; a worker that does not stop in time is killed."""
        with suppress(TimeoutError, RayActorError, RayTaskError):
            await asyncio.wait_for(self._actor.shutdown.remote(), SHUTDOWN_DEADLINE_S)
        ray.kill(self._actor)

    async def _call(self, what: str, reference: Awaitable[T], deadline: str) -> T:
        return await self._await(what, reference, getattr(self._deadlines, deadline))

    async def _await(self, what: str, reference: Awaitable[T], seconds: float) -> T:
        try:
            return await asyncio.wait_for(reference, seconds)
        except TimeoutError:
            raise RunError(
                self._obituary(f"{self._name} hangs: {what} took more than {seconds:g} s")
            ) from None
        except RayActorError:
            raise RunError(self._obituary(f"{self._name} died while {what}")) from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineDeadError):
                raise RunError(self._obituary(f"the vLLM engine of {self._name} died while {what}")) from None
            if isinstance(cause, (RunError, ConfigError, GenerationError)):
                raise type(cause)(str(cause)) from None
            raise RunError(self._obituary(f"{self._name} failed while {what}: {cause!r}")) from error

    def _obituary(self, what: str) -> str:
        lines = last_lines(self._log_path)
        return f"{what}; last lines of {self._log_path}:\n{lines}" if lines else what
