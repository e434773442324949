"""The colocated worker: one Ray actor that owns trainer and inference engine, which take turns."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
import ray

from k2rl.config import CheckpointEngineConfig, InferenceConfig, ObjectiveConfig, OptimizerConfig
from k2rl.hardware import fast_dtype
from k2rl.inference.engine import Generation, Sampling
from k2rl.inference.prefork import start_server
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
from k2rl.workers.memory import GIB, Kind, MemoryLedger, resident, trim
from k2rl.workers.process import redirect_output

if TYPE_CHECKING:
    from k2rl.checkpoint_engine.publisher import Publisher
    from k2rl.checkpoint_engine.sender import Source
    from k2rl.inference.vllm import VLLMEngine

P = ParamSpec("P")
T = TypeVar("T")


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker needs to start."""

    model_path: str
    #: `bfloat16`, `float32`, or `auto`: what the worker's hardware is fast at.
    dtype: str
    #: Where the trainer computes: `cpu` or `cuda`. vLLM finds its own.
    device: str
    stop_token_ids: tuple[int, ...]
    seed: int
    log_path: str
    optimizer: OptimizerConfig
    micro_batch_tokens: int
    num_threads: int
    inference: InferenceConfig
    checkpoint_engine: CheckpointEngineConfig
    #: Without a trainer the worker serves the checkpoint as it is (evaluation alone).
    trains: bool = True
    #: Without vLLM it trains on what it is given, and publishes nothing (`debug=train_only`).
    serves: bool = True
    #: Where the trainer's weights and optimizer state are while vLLM serves, see `TrainEngine`; files are
    #: beside the log.
    offload: str = "none"
    #: And its gradients.
    gradients: str = "drop"
    activation_checkpointing: bool = False


class ColocatedWorker:
    """Methods are coroutines; whatever computes runs in a thread, so heartbeats are always answered."""

    def __init__(self, spec: WorkerSpec) -> None:
        redirect_output(Path(spec.log_path))
        if spec.dtype == "auto":
            spec = msgspec.structs.replace(spec, dtype=fast_dtype(gpu=spec.device == "cuda"))
        self._spec = spec
        self._ledger = MemoryLedger()
        self._vllm_bytes: dict[Kind, int] = {}
        # One thread for the trainer's whole life: OpenMP's thread count belongs to the thread that sets it,
        # and calls wait for each other.
        self._trainer_thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")

    async def start(self) -> str:
        """Start trainer and vLLM, at the same time; returns the dtype they compute in."""
        if not self._spec.serves:
            await asyncio.to_thread(_import_engines, "transformers.modeling_utils", "k2rl.training.engine")
            await self._train(self._start_trainer)
            return self._spec.dtype
        start_server()
        await asyncio.to_thread(
            _import_engines,
            *("transformers.modeling_utils", "vllm.v1.engine.async_llm", "k2rl.training.engine"),
        )
        # The trainer begins after vLLM is configured: see `VLLMEngine`.
        vllm = await asyncio.to_thread(self._configured_vllm)
        self._resident_before = resident()
        _, self._vllm = await asyncio.gather(self._train(self._start_trainer), asyncio.to_thread(vllm.start))
        self._publisher = self._make_publisher()
        self._note_holdings()
        await self._publisher.start()
        return self._spec.dtype

    async def _train(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Let the trainer's thread do something, after whatever it was given before."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._trainer_thread, partial(work, *arguments, **options))

    def _start_trainer(self) -> None:
        spec = self._spec
        if not spec.trains:
            return
        from k2rl.training.engine import TrainEngine

        self._trainer = TrainEngine(
            spec.model_path,
            spec.dtype,
            spec.optimizer,
            spec.micro_batch_tokens,
            spec.seed,
            spec.num_threads,
            spec.device,
            spec.offload,
            Path(spec.log_path).parent,
            spec.gradients,
            spec.activation_checkpointing,
        )

    def _configured_vllm(self) -> VLLMEngine:
        from k2rl.inference.vllm import VLLMEngine

        spec = self._spec
        return VLLMEngine(Path(spec.model_path), spec.dtype, spec.stop_token_ids, spec.inference, spec.seed)

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        return await self._vllm.generate(prompt_ids, sampling)

    async def policy_step(
        self,
        groups: Sequence[Sequence[TrainSequence]],
        objective: ObjectiveConfig,
        temperature: float,
        ptx_sequences: Sequence[SupervisedSequence],
        ptx_weight: float,
        updates: int,
        totals: BatchTotals,
    ) -> dict[str, float]:
        """See `TrainEngine.policy_step`; also the switch and what is held, see `_to_training`."""
        switch = await self._to_training()
        learned = await self._train(
            self._trainer.policy_step,
            groups,
            objective=objective,
            temperature=temperature,
            ptx_sequences=ptx_sequences,
            ptx_weight=ptx_weight,
            updates=updates,
            totals=totals,
        )
        self._note_holdings()
        return learned | switch | self._holdings("training")

    async def sft_step(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        """See `TrainEngine.sft_step`."""
        await self._to_training()
        learned = await self._train(self._trainer.sft_step, sequences)
        self._note_holdings()
        return learned

    async def _to_training(self) -> dict[str, float]:
        """Let vLLM give its memory back, if it has not yet, and the trainer take its own again.

        Returns:
            `memory/to_training_s`, and in GiB the physical memory that vLLM's workers hold now
            (`memory/vllm_while_training_gib`) and held before they had a model
            (`memory/vllm_without_model_gib`); nothing if vLLM slept already, or is not to.

        Raises:
            RunError: vLLM holds memory that it should have given back.
        """
        start = time.perf_counter()
        spec = self._spec
        turns = spec.serves and spec.inference.sleep_while_training and not self._vllm.asleep
        if turns:
            await self._vllm.sleep()
            self._ledger.give_up("vllm")
        self._ledger.begin("trainer")
        await self._train(self._trainer.reload)
        self._note_holdings()
        if not turns:
            return {}
        seconds = time.perf_counter() - start
        now, before = await self._vllm.resident_memory()
        return {
            "memory/to_training_s": seconds,
            "memory/vllm_while_training_gib": now / GIB,
            "memory/vllm_without_model_gib": before / GIB,
        }

    async def _to_serving(self) -> dict[str, float]:
        """Let the trainer give back what it can, and wake vLLM up; returns `memory/to_serving_s`.

        Raises:
            RunError: the trainer holds memory that it should have given back.
        """
        start = time.perf_counter()
        await self._rest()
        self._ledger.give_up("trainer")
        self._ledger.begin("vllm")
        if self._vllm.asleep:
            await self._vllm.wake_up()
        self._note_holdings()
        return {"memory/to_serving_s": time.perf_counter() - start}

    async def _rest(self) -> None:
        """Let go of what this process needs for training, and for pushes, alone.

        Reading the trainer's weights, for a push, say, takes those pages again.
        """
        self._sender.unload()
        if self._spec.trains:
            await self._train(self._trainer.offload)
        trim()

    def _note_holdings(self) -> None:
        """Enter in the ledger what the engine whose turn it is has; at the start, what both have."""
        spec, turn, hold = self._spec, self._ledger.turn, self._ledger.hold
        if spec.trains and turn != "vllm":
            state = self._trainer.state_bytes()
            hold("trainer", "parameters", state["parameters"], spec.device, spec.offload != "none")
            hold("trainer", "optimizer", state["optimizer"], spec.device, spec.offload != "none")
            gradients, moves = state["gradients"] if turn else 0, spec.gradients != "keep"
            hold("trainer", "gradients", gradients, spec.device, moves)
        if turn != "trainer":
            for kind, nbytes in self._vllm_bytes.items():
                hold("vllm", kind, nbytes, spec.device, spec.inference.sleep_while_training)

    def _holdings(self, phase: str) -> dict[str, float]:
        return {f"memory/{phase}/{name}": gib for name, gib in self._ledger.gib().items()}

    async def reset_optimizer(self, lr: float) -> None:
        await self._train(self._trainer.reset_optimizer, lr)

    async def publish(self) -> dict[str, float]:
        """Push the trainer's weights (the checkpoint's where nothing trains) into vLLM.

        Their version is the number of optimizer steps that made them, so that a resumed run goes on
        counting.

        Returns:
            `version`, `bytes`, and the seconds spent copying out (`write_s`) and in place (`update_s`, in
            which nothing is generated); what `_to_serving` says; in GiB the physical memory that this process
            holds now (`memory/trainer_while_serving_gib`) and held before the trainer had a model
            (`memory/trainer_without_model_gib`), and what is held of which kind (`memory/serving/...`).
        """
        switch = await self._to_serving()
        from k2rl.checkpoint_engine.publisher import local_rank

        version = self._trainer.step_count if self._spec.trains else 0
        with self._source() as source:
            rank = local_rank(self._sender, source, self._train)
            report = await self._publisher.publish({0: rank}, version)
        await self._rest()
        return {
            "version": float(report.version),
            "bytes": float(report.nbytes),
            "write_s": report.stage_s,
            "update_s": report.apply_s,
            **switch,
            "memory/trainer_while_serving_gib": resident() / GIB,
            "memory/trainer_without_model_gib": self._resident_before / GIB,
            **self._holdings("serving"),
        }

    async def weights_digest(self) -> str:
        """Of the weights that vLLM serves: equal for equal bits, also in another process."""
        return self._publisher.coordinator.digest

    def _make_publisher(self) -> Publisher:
        from k2rl.checkpoint_engine.disk import checkpoint_manifest
        from k2rl.checkpoint_engine.publisher import Publisher, expected_tensors
        from k2rl.checkpoint_engine.sender import Sender

        self._sender = Sender(0)
        spec = self._spec
        expected = expected_tensors(Path(spec.model_path), spec.dtype)
        self._vllm_bytes = {
            "weights": checkpoint_manifest(Path(spec.model_path), 1, spec.dtype).nbytes,
            "kv_cache": int(spec.inference.kv_cache_gib * GIB) * self._vllm.num_receivers,
        }
        return Publisher({"vLLM": self._vllm}, spec.checkpoint_engine, expected)

    @contextmanager
    def _source(self) -> Iterator[Source]:
        from k2rl.checkpoint_engine.source import StoredWeights

        if self._spec.trains:
            yield self._trainer.weights_source()
            return
        with closing(StoredWeights(Path(self._spec.model_path), self._spec.dtype)) as stored:
            yield stored

    async def logprob_gap(self, prompts: Sequence[list[int]], max_tokens: int, seed: int) -> dict[str, float]:
        """Sample from vLLM at temperature 1 and score the same tokens with the trainer.

        Returns:
            `mean` and `max` of |trainer log-prob - vLLM log-prob| in nats, and `tokens`.
        """
        sampling = Sampling(1.0, max_tokens, seed)
        generations = await asyncio.gather(*(self._vllm.generate(prompt, sampling) for prompt in prompts))
        sequences = [[*prompt, *g.token_ids] for prompt, g in zip(prompts, generations, strict=True)]
        scored = await self._train(self._trainer.logprobs, sequences)
        await self._rest()
        gaps = [
            abs(ours - theirs)
            for g, logprobs in zip(generations, scored, strict=True)
            for ours, theirs in zip(logprobs[-len(g.token_ids) :], g.logprobs, strict=True)
        ]
        return {"mean": sum(gaps) / len(gaps), "max": max(gaps), "tokens": float(len(gaps))}

    async def _rest_unless_training(self) -> None:
        if self._spec.serves and not self._vllm.asleep:
            await self._rest()

    async def save(self, folder: str) -> None:
        await self._train(self._trainer.save, folder)
        await self._train(self._trainer.saved)
        await self._rest_unless_training()

    async def load(self, folder: str) -> None:
        await self._train(self._trainer.load, folder)

    async def save_pretrained(self, folder: str) -> None:
        await self._train(self._trainer.save_pretrained, folder)
        await self._rest_unless_training()

    async def heartbeat(self) -> dict[str, Any]:
        """Answers at once, whatever is being computed.

        Raises:
            EngineDeadError: vLLM is gone.
        """
        if not self._spec.serves:
            return {"pid": os.getpid()}
        await self._vllm.check_health()
        return {"pid": os.getpid(), "version": self._vllm.version}

    async def shutdown(self) -> None:
        if hasattr(self, "_publisher"):
            await self._publisher.close()
        if hasattr(self, "_vllm"):
            await asyncio.to_thread(self._vllm.shutdown)


def _import_engines(*modules: str) -> None:
    """Import before the engines start in two threads: these libraries' cyclic imports need one at a time."""
    for module in modules:
        importlib.import_module(module)


def create_actor(spec: WorkerSpec, cpus: float, gpus: float) -> Any:
    """Place a worker in the Ray cluster."""
    options = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": 4096, "max_restarts": 0}
    return ray.remote(ColocatedWorker).options(**options).remote(spec)
