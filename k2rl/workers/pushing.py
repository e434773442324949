"""A worker's parts in pushes: it sends its weights, lets its vLLM receive, and, as rank 0, makes them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec

from k2rl.diagnosis.activity import TRAINER
from k2rl.inference.engine import EngineDeadError
from k2rl.workers.hosted_engine import HostedEngine
from k2rl.workers.memory import GIB, Kind
from k2rl.workers.spec import Place, WorkerSpec

if TYPE_CHECKING:
    from k2rl.checkpoint_engine.agent import HostAgent
    from k2rl.checkpoint_engine.engines import ReceivingEngine
    from k2rl.checkpoint_engine.manifest import Manifest
    from k2rl.checkpoint_engine.messages import Address
    from k2rl.checkpoint_engine.plan import Needs, Plan, Rows
    from k2rl.checkpoint_engine.publisher import Publisher, TrainerRank
    from k2rl.checkpoint_engine.push import PushReport
    from k2rl.checkpoint_engine.sender import Sender, Source
    from k2rl.training.engine import TrainEngine


P = ParamSpec("P")
T = TypeVar("T")


class Published(msgspec.Struct, frozen=True):
    """What became of a push or a join."""

    version: int
    #: Whether the version is committed: engines that live serve it.
    committed: bool
    #: Engines that died of it, by the rank of their worker, and why.
    lost: dict[int, str]
    #: Why it failed; empty if it did not.
    error: str
    metrics: dict[str, float]


class PushingWorker:
    """What of `ColocatedWorker` has to do with pushes."""

    _spec: WorkerSpec
    _place: Place
    _trainer: TrainEngine
    _sender: Sender

    def __init__(self) -> None:
        # One thread for the trainer's whole life: OpenMP's thread count belongs to the thread that sets it,
        # and calls wait for each other.
        self._trainer_thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._vllm: HostedEngine | None = None
        self._vllm_bytes: dict[Kind, int] = {}
        self._publisher: Publisher | None = None
        self._agent: HostAgent | None = None

    async def _train(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Let the trainer's thread do something, after whatever it was given before."""

        def traced() -> T:
            with TRAINER.doing(getattr(work, "__name__", "working").strip("_").replace("_", " ")):
                return work(*arguments, **options)

        return await asyncio.get_running_loop().run_in_executor(self._trainer_thread, traced)

    def _prepare_pushes(self) -> None:
        from k2rl.checkpoint_engine.disk import checkpoint_manifest
        from k2rl.checkpoint_engine.sender import Sender

        spec, place = self._spec, self._place
        self._sender = Sender(place.rank, place.host)
        if self._vllm is not None:
            self._vllm_bytes = {
                "weights": checkpoint_manifest(Path(spec.model_path), 1, spec.dtype).nbytes,
                "kv_cache": int(spec.inference.kv_cache_gib * GIB) * self._vllm.num_receivers,
            }

    async def lead_pushes(
        self, actors: Sequence[Any], places: Sequence[Place], receivers: Mapping[int, int]
    ) -> None:
        """Rank 0 makes the pushes, once all have started.

        Args:
            actors: all workers, by rank.
            places: theirs.
            receivers: vLLM's workers, by the rank of each worker that leads a replica.
        """
        from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors
        from k2rl.models.adapters import adapter_tensors

        spec, place = self._spec, self._place
        self._actors, self._places = actors, places
        agents = {}
        if place.listen:
            first = {other.host: other.rank for other in reversed(places)}
            agents = {host: _remote_agent(actors[rank]) for host, rank in first.items()}
        expected = expected_tensors(Path(spec.model_path), spec.dtype)
        if spec.lora is not None:
            expected |= adapter_tensors(Path(spec.model_path), spec.lora, spec.dtype)
        engines = {engine_name(rank): self._engine_of(rank, count) for rank, count in receivers.items()}
        self._publisher = Publisher(
            engines, spec.checkpoint_engine, expected, agents, place.host, place.listen
        )
        await self._publisher.start()

    def _engine_of(self, rank: int, receivers: int) -> ReceivingEngine:
        from k2rl.workers.remote import RemoteEngine

        if rank == self._place.rank:
            assert self._vllm is not None
            return self._vllm
        return RemoteEngine(self._actors[rank], self._places[rank].host, receivers)

    async def publish(self, restarted: Mapping[int, int]) -> Published:
        """Push the trainers' weights (the checkpoint's where nothing trains) into every vLLM.

        Their version is the number of optimizer steps that made them, so that a resumed run goes on
        counting.

        Args:
            restarted: workers of engines that take part again, by the rank of the worker that leads them.

        Returns:
            Its metrics: `version`, `bytes`, and the seconds spent copying out (`write_s`) and in place
            (`update_s`, in which nothing is generated).
        """
        from k2rl.checkpoint_engine.publisher import local_rank
        from k2rl.workers.remote import remote_rank

        assert self._publisher is not None
        for rank, receivers in restarted.items():
            self._publisher.engines[engine_name(rank)] = self._engine_of(rank, receivers)
        version = self._trainer.step_count if self._spec.trains else 0
        with self._source() as source:
            ranks: dict[int, TrainerRank] = {
                0: local_rank(self._sender, source, self._train, self._place.host)
            }
            if self._spec.trains:
                others = list(zip(self._places, self._actors, strict=True))[1:]
                found = await asyncio.gather(*(remote_rank(actor, place.host) for place, actor in others))
                ranks |= dict(enumerate(found, start=1))
            return await self._pushed(self._publisher.publish(ranks, version), version)

    async def bring_up(self, rank: int, receivers: int) -> Published:
        """Bring the committed version into a vLLM that was started again; the others are not disturbed."""
        assert self._publisher is not None
        version = self._publisher.coordinator.version
        joining = self._publisher.join(engine_name(rank), self._engine_of(rank, receivers))
        try:
            return await self._pushed(joining, -1 if version is None else version, (engine_name(rank),))
        except ValueError as error:  # a ring of buckets keeps no version
            return Published(-1, False, {}, str(error), {})

    async def _pushed(
        self, push: Awaitable[PushReport], version: int, joining: Collection[str] = ()
    ) -> Published:
        from k2rl.checkpoint_engine.messages import TransferError

        assert self._publisher is not None
        before = {*self._publisher.engines, *joining}
        metrics: dict[str, float] = {}
        lost: dict[int, str] = {}
        error = ""
        try:
            report = await push
            metrics = {
                "version": float(report.version),
                "bytes": float(report.nbytes),
                "write_s": report.stage_s,
                "update_s": report.apply_s,
            }
        except EngineDeadError as died:
            error = str(died)
            gone = before - self._publisher.engines.keys()
            lost = {int(name.rpartition(" ")[2]): error for name in gone}
        except TransferError as failed:
            error = str(failed)
        return Published(version, self._publisher.coordinator.version == version, lost, error, metrics)

    async def weights_digest(self) -> str:
        """Of the weights that vLLM serves: equal for equal bits, also in another process."""
        assert self._publisher is not None
        return self._publisher.coordinator.digest

    # This worker's parts in rank 0's pushes.

    async def weights_manifest(self) -> Manifest:
        with self._source() as source:
            return source.manifest

    async def send_weights(self, address: Address, deadline_s: float) -> int:
        with self._source() as source:
            return await self._train(self._sender.send, source, address, deadline_s)

    async def changed_weights(self, plan: Plan, base: int, version: int) -> Rows:
        with self._source() as source:
            return await self._train(self._sender.changes, source, plan, base, version)

    async def pass_on(self, address: Address, deadline_s: float) -> int:
        """Serve as the host's agent: see `HostAgent.take_part`."""
        from k2rl.checkpoint_engine.agent import HostAgent

        if self._agent is None:
            self._agent = HostAgent(self._place.host)
        return await asyncio.to_thread(self._agent.take_part, address, deadline_s)

    async def join_push(self, address: Address, version: int, deadline_s: float, first_receiver: int) -> None:
        assert self._vllm is not None
        await self._vllm.join_push(address, version, deadline_s, first_receiver)

    async def push_ended(self) -> None:
        assert self._vllm is not None
        await self._vllm.push_ended()

    async def push_settled(self) -> tuple[BaseException | None, Sequence[Needs] | None]:
        assert self._vllm is not None
        outcome = await self._vllm.push_settled()
        return outcome, None if self._vllm.died else self._vllm.needs

    @contextmanager
    def _source(self) -> Iterator[Source]:
        from k2rl.checkpoint_engine.source import StoredWeights

        if self._spec.trains:
            yield self._trainer.weights_source()
            return
        with closing(StoredWeights(Path(self._spec.model_path), self._spec.dtype)) as stored:
            yield stored


def engine_name(rank: int) -> str:
    """What errors of pushes call the vLLM of a worker."""
    return f"vLLM of worker {rank}"


def _remote_agent(actor: Any) -> Callable[[Address, float], Awaitable[object]]:
    return lambda address, deadline_s: actor.pass_on.remote(address, deadline_s)
