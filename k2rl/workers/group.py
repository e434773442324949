"""The driver's side of all workers together: what the loop calls, and what is done about deaths."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from k2rl.config import Config
from k2rl.errors import ConfigError, RunError
from k2rl.inference.engine import Generation, Sampling
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
from k2rl.workers.cluster import placed
from k2rl.workers.colocated import log_name
from k2rl.workers.handle import EngineLostError, Worker, WorkerLostError
from k2rl.workers.placement import places
from k2rl.workers.pushing import Published
from k2rl.workers.recovery import Recovery
from k2rl.workers.replicas import Replicas
from k2rl.workers.spec import WorkerSpec

HEARTBEAT_INTERVAL_S = 2.0
#: Within which a failure that is common to all workers comes from all of them.
GRACE_S = 2.0
#: For a death to become known.
DIAGNOSIS_S = 30.0


class WorkerGroup:
    """Started workers. Every call goes to all that have a part in it; the first failure is raised, by name.

    Raises `WorkerLostError` when a worker is gone, and the whole group with it. A vLLM that is gone is
    started again, as often as `Recovery` allows; then `EngineLostError`.
    """

    def __init__(
        self, workers: Sequence[Worker], config: Config, recovery: Recovery, serves: bool = True
    ) -> None:
        """`serves`: whether the workers have vLLMs."""
        self._workers = list(workers)
        self._config = config
        self._recovery = recovery
        self._reserved: PlacementGroup | None = None
        #: What trainers and vLLM compute in; known once started.
        self.dtype = ""
        #: Whether the trainers can be asked nothing more.
        self.lost = False
        leaders = workers[:: config.inference.tensor_parallel] if serves else []
        self._replicas = Replicas(
            {worker.rank: worker for worker in leaders}, config.deadlines, recovery, self._bring_up
        )
        self._serving = False

    @classmethod
    async def start(cls, config: Config, spec: WorkerSpec, recovery: Recovery) -> WorkerGroup:
        """Place the workers in Ray and start their engines.

        Raises:
            ConfigError: the cluster cannot hold them.
            RunError: they did not start in time, or died.
        """
        actors, reserved = await placed(config, spec, patient=recovery.began)
        folder, deadlines = Path(spec.log_folder), config.deadlines
        workers = [
            Worker(actor, rank, folder / log_name(rank), deadlines) for rank, actor in enumerate(actors)
        ]
        group = cls(workers, config, recovery, spec.serves)
        group._reserved = reserved
        try:
            await group._start(spec)
        except BaseException:
            group.kill()
            raise
        return group

    async def _start(self, spec: WorkerSpec) -> None:
        workers = self._workers
        sites = await self._all("starting", "site", "start_s")
        for worker, site in zip(workers, sites, strict=True):
            worker.site = site
        self.dtype = spec.dtype
        if spec.dtype == "auto":
            dtypes = {site.fast_dtype for site in sites}
            self.dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        meeting_point = await workers[0].call("starting", "free_address", "start_s")
        ranks = self._config.inference.tensor_parallel
        found = places(sites, ranks, meeting_point, self.dtype, spec.serves)
        receivers = await self._gathered(
            worker.call("starting", "start", "start_s", place)
            for worker, place in zip(workers, found, strict=True)
        )
        if spec.serves:
            actors = [worker.actor for worker in workers]
            engines = {place.rank: receivers[place.rank] for place in found if place.leads}
            await workers[0].call("starting", "lead_pushes", "start_s", actors, found, engines)

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """See `Replicas.generate`."""
        return await self._replicas.generate(prompt_ids, sampling)

    async def interrupt(self) -> None:
        """See `Replicas.interrupt`."""
        await self._replicas.interrupt()

    @property
    def version(self) -> int:
        """Of the weights that vLLM serves; that of no weights before any were published."""
        return self._replicas.version

    async def policy_step(
        self,
        groups: Sequence[Sequence[TrainSequence]],
        config: Config,
        temperature: float,
        ptx_sequences: Sequence[SupervisedSequence],
        totals: BatchTotals,
    ) -> dict[str, float]:
        """See `TrainEngine.policy_step`; of what workers measure themselves, see `combined`."""
        switch = await self._end_serving()
        objective, ptx_weight, updates = config.objective, config.ptx.weight, config.train.updates_per_step
        batch = (groups, objective, temperature, ptx_sequences, ptx_weight, updates, totals)
        return combined(await self._all("training", "policy_step", "train_s", *batch)) | switch

    async def sft_step(self, sequences: Sequence[SupervisedSequence], lr: float) -> dict[str, float]:
        """See `TrainEngine.sft_step`."""
        switch = await self._end_serving()
        return combined(await self._all("supervised step", "sft_step", "train_s", sequences, lr)) | switch

    async def nll(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        """See `TrainEngine.nll`."""
        return combined(await self._all("scoring held-out texts", "nll", "train_s", sequences))

    async def reset_optimizer(self, lr: float) -> None:
        await self._all("resetting the optimizer", "reset_optimizer", "train_s", lr)

    async def _end_serving(self) -> dict[str, float]:
        if not self._serving:
            return {}
        await self._replicas.settle()
        self._serving = False
        self._replicas.fence()
        return combined(await self._all("switching to training", "end_serving", "publish_s"))

    async def publish(self) -> dict[str, float]:
        """Push the trainers' weights into every vLLM, which is started first if it has died.

        Returns:
            What `ColocatedWorker.begin_serving`, `publish` and `rest` say.
        """
        await self._replicas.settle()
        self._serving = True
        self._replicas.fence()
        await self._all("switching to serving", "end_training", "publish_s")
        switch = combined(await self._all("switching to serving", "begin_serving", "publish_s"))
        published = await self._pushed()
        holdings = combined(await self._all("publishing weights", "rest", "publish_s"))
        self._replicas.admit(published.version)
        return {"version": float(published.version), **published.metrics, **switch, **holdings}

    async def _pushed(self) -> Published:
        """Push until it is committed, to those vLLMs that live."""
        restarted: dict[int, int] = {}
        while True:
            await self._look()
            restarted |= await self._replicas.start_dead()
            published: Published = await self._first("publishing weights", "publish", "publish_s", restarted)
            for leader, why in published.lost.items():
                worker = self._workers[leader]
                self._replicas.lose(leader, worker.engine_lost(f"died while publishing weights: {why}"))
            if published.committed:
                return published
            if not published.lost:
                await self._diagnosed()
                self._recovery.spend(RunError(f"publishing weights failed: {published.error}"))

    async def _bring_up(self, leader: int, receivers: int) -> Published:
        what = "bringing a vLLM up to date"
        published: Published = await self._first(what, "bring_up", "publish_s", leader, receivers)
        return published

    async def weights_digest(self) -> str:
        """See `ColocatedWorker.weights_digest`."""
        digest: str = await self._first("naming its weights", "weights_digest", "publish_s")
        return digest

    async def logprob_gap(self, prompts: Sequence[list[int]], max_tokens: int, seed: int) -> dict[str, float]:
        """Sample from every vLLM at temperature 1 and score the same tokens with the trainer.

        Returns:
            `mean` and `max` of |trainer log-prob - vLLM log-prob| in nats, and `tokens`.
        """
        sampling, leaders = Sampling(1.0, max_tokens, seed), self._replicas.serving
        given = [prompts[number % len(prompts)] for number in range(max(len(prompts), len(leaders)))]
        generations = await asyncio.gather(
            *(
                self._replicas.generate_at(leaders[number % len(leaders)], prompt, sampling)
                for number, prompt in enumerate(given)
            )
        )
        sequences = [[*prompt, *g.token_ids] for prompt, g in zip(given, generations, strict=True)]
        scored = (await self._all("comparing log-probs", "logprobs", "generate_s", sequences))[0]
        gaps = [
            abs(ours - theirs)
            for g, logprobs in zip(generations, scored, strict=True)
            for ours, theirs in zip(logprobs[-len(g.token_ids) :], g.logprobs, strict=True)
        ]
        return {"mean": sum(gaps) / len(gaps), "max": max(gaps), "tokens": float(len(gaps))}

    async def save(self, folder: Path) -> None:
        """Returns once the state has been copied aside; it is written while other things are done."""
        await self._all("saving a checkpoint", "save", "checkpoint_s", str(folder))

    async def saved(self) -> None:
        """Wait for what `save` has begun; raises what went wrong."""
        await self._all("writing a checkpoint", "saved", "checkpoint_s")

    async def load(self, folder: Path) -> None:
        await self._all("loading a checkpoint", "load", "checkpoint_s", str(folder))

    async def save_pretrained(self, folder: Path) -> None:
        await self._all("saving the model", "save_pretrained", "checkpoint_s", str(folder))

    async def watch(self) -> None:
        """Heartbeats without end; what of vLLM has died is started again.

        Raises:
            WorkerLostError: a worker died, or does not answer.
            EngineLostError: a vLLM did, and has been started again too often.
        """
        failed = self._replicas.failed
        while True:
            await self._look()
            await asyncio.wait([failed], timeout=HEARTBEAT_INTERVAL_S)
            if failed.done():
                failed.result()

    async def _look(self) -> None:
        """Ask every worker how it is, and see to the vLLMs that have died."""
        beats = [asyncio.ensure_future(worker.heartbeat()) for worker in self._workers]
        try:
            for worker, beat in zip(self._workers, beats, strict=True):
                await self._replicas.look(worker.rank, *await beat)
        except WorkerLostError:
            self.lost = True
            raise
        finally:
            for beat in beats:
                beat.cancel()

    async def _first(self, what: str, method: str, deadline: str, *arguments: object) -> Any:
        """A call of rank 0's alone; if it fails, one that died elsewhere is the reason."""
        try:
            return await self._workers[0].call(what, method, deadline, *arguments)
        except RunError:
            await self._diagnosed()
            raise

    async def _all(self, what: str, method: str, deadline: str, *arguments: object) -> list[Any]:
        """The answers of all workers, by rank; arguments are put into Ray's object store once."""
        shared = [ray.put(argument) for argument in arguments] if len(self._workers) > 1 else arguments
        return await self._gathered(worker.call(what, method, deadline, *shared) for worker in self._workers)

    async def _gathered(self, calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(task.done() and task.exception() for task in tasks):
                await self._fail(tasks)
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    async def _fail(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Raise what they failed with: the death of a worker, if there is one, before what came of it."""
        _, waiting = await asyncio.wait(tasks, timeout=GRACE_S)
        await self._diagnosed(task.exception() for task in tasks if task.done())
        # What fails for one rank fails for all of them, if a little later.
        _, waiting = await asyncio.wait(tasks, timeout=self._config.deadlines.heartbeat_s)
        errors = [error for task in tasks if task.done() and (error := task.exception()) is not None]
        if waiting:
            self.lost = True
            late = [worker.name for worker, task in zip(self._workers, tasks, strict=True) if task in waiting]
            raise WorkerLostError(f"{', '.join(late)} hangs, after {errors[0]}") from errors[0]
        kinds = (WorkerLostError, EngineLostError, ConfigError, RunError)
        raise min(
            errors, key=lambda error: next(i for i, kind in enumerate(kinds) if isinstance(error, kind))
        )

    async def _diagnosed(self, errors: Iterable[BaseException | None] = ()) -> None:
        """If a worker has died, raise that: what others say of it is its consequence.

        Args:
            errors: that are known already.
        """
        for known in errors:
            if isinstance(known, WorkerLostError):
                self.lost = True
                raise known
        beats = [asyncio.ensure_future(worker.heartbeat()) for worker in self._workers]
        done, late = await asyncio.wait(beats, timeout=DIAGNOSIS_S)
        for beat in late:
            beat.cancel()
        for beat in beats:
            if beat in done and (error := beat.exception()) is not None:
                self.lost = True
                raise error

    async def shutdown(self) -> None:
        """Stop all; a worker that does not stop in time is killed."""
        self._replicas.stop()
        if not self.lost:
            await asyncio.gather(*(worker.shutdown() for worker in self._workers))
        self.kill()

    def kill(self) -> None:
        """At once."""
        for worker in self._workers:
            worker.kill()
        if self._reserved is not None:
            with suppress(RayError):
                remove_placement_group(self._reserved)


def combined(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Those of all workers as one.

    Memory is summed; of times, the longest counts; what else they say, all of them say alike.
    """
    found: dict[str, float] = {}
    for row in metrics:
        for name, value in row.items():
            if name not in found:
                found[name] = value
            elif name.endswith("_gib"):
                found[name] += value
            elif name.endswith("_s"):
                found[name] = max(found[name], value)
    return found
