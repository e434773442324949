"""The driver's side of a worker: every call has a deadline, every death is named and shown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from k2rl.config import ClusterConfig, Config, DeadlineConfig
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import EngineDeadError, Generation, GenerationError, Sampling
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
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
        #: Whether the actor died or no longer answers: nothing more can be asked of it.
        self.lost = False

    @classmethod
    async def start(cls, config: Config, spec: WorkerSpec) -> Worker:
        """Place the actor in Ray and start its engines.

        Raises:
            ConfigError: no node of the cluster is large enough.
            RunError: it did not start in time, or died.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        actor = create_actor(spec, *reservation(config.cluster, nodes))
        worker = cls(actor, "worker 0", Path(spec.log_path), config.deadlines)
        try:
            worker.dtype = await worker._call("starting", actor.start.remote(), "start_s")
        except BaseException:
            ray.kill(actor)
            raise
        return worker

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """See `InferenceEngine.generate`."""
        reference = self._actor.generate.remote(prompt_ids, sampling)
        # vLLM that is slow or stuck leaves the trainer able to save.
        return await self._await("generating", reference, self._deadlines.generate_s, late_is_lost=False)

    async def policy_step(
        self,
        groups: Sequence[Sequence[TrainSequence]],
        config: Config,
        temperature: float,
        ptx_sequences: Sequence[SupervisedSequence],
        totals: BatchTotals,
    ) -> dict[str, float]:
        """See `TrainEngine.policy_step`."""
        reference = self._actor.policy_step.remote(
            groups,
            config.objective,
            temperature,
            ptx_sequences,
            config.ptx.weight,
            config.train.updates_per_step,
            totals,
        )
        return await self._call("training", reference, "train_s")

    async def sft_step(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        return await self._call("warm start", self._actor.sft_step.remote(sequences), "train_s")

    async def reset_optimizer(self, lr: float) -> None:
        await self._call("resetting the optimizer", self._actor.reset_optimizer.remote(lr), "train_s")

    async def publish(self) -> dict[str, float]:
        return await self._call("publishing weights", self._actor.publish.remote(), "publish_s")

    async def weights_digest(self) -> str:
        """See `ColocatedWorker.weights_digest`."""
        return await self._call("naming its weights", self._actor.weights_digest.remote(), "publish_s")

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
        with suppress(TimeoutError, RayError):
            await asyncio.wait_for(self._actor.shutdown.remote(), SHUTDOWN_DEADLINE_S)
        ray.kill(self._actor)

    async def _call(self, what: str, reference: Awaitable[T], deadline: str) -> T:
        return await self._await(what, reference, getattr(self._deadlines, deadline))

    async def _await(
        self, what: str, reference: Awaitable[T], seconds: float, late_is_lost: bool = True
    ) -> T:
        try:
            return await asyncio.wait_for(reference, seconds)
        # First: what a method of the worker raised is also an instance of its cause, even of TimeoutError.
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineDeadError):
                raise RunError(self._obituary(f"the vLLM engine of {self._name} died while {what}")) from None
            if isinstance(cause, (RunError, ConfigError, GenerationError)):
                raise type(cause)(str(cause)) from None
            raise RunError(self._obituary(f"{self._name} failed while {what}: {cause!r}")) from error
        except TimeoutError:
            self.lost = self.lost or late_is_lost
            raise RunError(
                self._obituary(f"{self._name} hangs: {what} took more than {seconds:g} s")
            ) from None
        except RayActorError:
            self.lost = True
            raise RunError(self._obituary(f"{self._name} died while {what}")) from None
        except RayError as error:
            self.lost = True
            reason = " ".join(str(error).split())
            raise RunError(
                self._obituary(f"{self._name} was lost while {what}: {type(error).__name__}: {reason}")
            ) from error

    def _obituary(self, what: str) -> str:
        lines = last_lines(self._log_path)
        return f"{what}; last lines of {self._log_path}:\n{lines}" if lines else what


def reservation(config: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """The CPUs and GPUs to reserve for a worker, all of them on one of these nodes.

    Raises:
        ConfigError: no node has that many, so Ray would wait for them without end.
    """
    gpus = config.gpus_per_worker
    large = [node for node in nodes if node.get("GPU", 0.0) >= gpus]
    if not large:
        most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
        raise ConfigError(
            f"cluster.gpus_per_worker={gpus:g}, but no node of the Ray cluster has more than {most:g}"
        )
    most = max(node.get("CPU", 0.0) for node in large)
    if config.cpus_per_worker > most:
        kind = "node with such GPUs" if gpus else "node of the Ray cluster"
        raise ConfigError(
            f"cluster.cpus_per_worker={config.cpus_per_worker}, but no {kind} has more than {most:g}; "
            "0 reserves all of the largest"
        )
    return config.cpus_per_worker or most, gpus
