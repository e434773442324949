"""The colocated worker: a Ray actor that owns a trainer rank and perhaps vLLM, which take turns."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
import ray

from k2rl.config import ObjectiveConfig
from k2rl.diagnosis import activity
from k2rl.hardware import fast_dtype
from k2rl.inference.engine import EngineDeadError, Generation, Sampling
from k2rl.inference.prefork import start_server
from k2rl.training.batch import BatchTotals, SupervisedSequence, TrainSequence
from k2rl.workers.hosted_engine import HostedEngine
from k2rl.workers.memory import GIB, MemoryLedger, resident, trim
from k2rl.workers.process import redirect_output
from k2rl.workers.pushing import PushingWorker
from k2rl.workers.spec import Place, Site, WorkerSpec

if TYPE_CHECKING:
    from k2rl.inference.vllm import VLLMEngine


class ColocatedWorker(PushingWorker):
    """Methods are coroutines; whatever computes runs in a thread, so heartbeats are always answered."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        super().__init__()
        redirect_output(Path(spec.log_folder) / log_name(rank))
        activity.begin(Path(spec.log_folder), f"worker {rank}")
        self._spec = spec
        self._ledger = MemoryLedger()
        #: When the switch under way, or the last one, began.
        self._switch_began: float | None = None

    async def site(self) -> Site:
        """Where it is."""
        context = ray.get_runtime_context()
        return Site(
            context.get_node_id(),
            ray.util.get_node_ip_address(),
            os.getpid(),
            tuple(sorted(os.sched_getaffinity(0))),
            tuple(str(gpu) for gpu in ray.get_gpu_ids()),
            fast_dtype(gpu=self._spec.device == "cuda"),
        )

    async def free_address(self) -> str:
        """`host:port` of this node that nobody uses now."""
        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0)) as server:
            return f"{address}:{server.getsockname()[1]}"

    async def start(self, place: Place) -> int:
        """Start the trainer and, in one that leads a replica, vLLM, at the same time.

        Returns:
            The number of vLLM's workers.
        """
        self._place = place
        self._spec = spec = msgspec.structs.replace(self._spec, dtype=place.dtype)
        _use_cores(place.cores)
        if place.world > 1:
            _meet_at(ray.util.get_node_ip_address())
        modules = ["transformers.modeling_utils", "k2rl.training.engine"]
        vllm = None
        if place.leads:
            start_server()
            modules.insert(1, "vllm.v1.engine.async_llm")
        await asyncio.to_thread(_import_engines, *modules)
        if place.leads:
            # The trainer begins after vLLM is configured: see `VLLMEngine`.
            vllm = await self._configured_vllm()
            self._vllm = HostedEngine(self._configured_vllm, place.host)
        self._resident_before = resident()
        starting = [self._train(self._start_trainer)]
        if self._vllm is not None:
            starting.append(self._vllm.start(vllm))
        await asyncio.gather(*starting)
        if not spec.serves:
            return 0
        self._prepare_pushes()
        self._note_holdings()
        return self._vllm.num_receivers if self._vllm is not None else 0

    def _start_trainer(self) -> None:
        spec, place = self._spec, self._place
        if not spec.trains:
            return
        from k2rl.training.engine import TrainEngine
        from k2rl.training.ranks import Ranks

        self._trainer = TrainEngine(
            spec.model_path,
            spec.dtype,
            spec.optimizer,
            spec.micro_batch_tokens,
            spec.seed,
            spec.num_threads,
            spec.device,
            spec.offload,
            Path(spec.log_folder),
            spec.gradients,
            spec.activation_checkpointing,
            Ranks(place.rank, place.world, place.meeting_point, spec.collective_s),
            spec.lora,
        )

    async def _configured_vllm(self) -> VLLMEngine:
        """An engine to be started; made while the trainer does nothing, for the environment's sake."""
        from k2rl.inference.vllm import VLLMEngine

        spec, place = self._spec, self._place
        if place.engine_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(place.engine_gpus)
        return await self._train(
            VLLMEngine,
            Path(spec.model_path),
            spec.dtype,
            spec.stop_token_ids,
            spec.inference,
            spec.seed,
            place.engine_cores,
            None if spec.lora is None else spec.lora.scale,
            spec.vllm_keeps_weights,
        )

    @property
    def _engine(self) -> VLLMEngine:
        """Raises:
        EngineDeadError: it has died.
        """
        assert self._vllm is not None, "this worker leads no replica"
        return self._vllm.engine

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        return await self._engine.generate(prompt_ids, sampling)

    async def interrupt(self) -> None:
        """See `InterruptibleEngine.interrupt`."""
        await self._engine.interrupt()

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
        """See `TrainEngine.policy_step`; also what is held, and `memory/to_training_s` after vLLM's turn."""
        switch = await self._begin_training()
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

    async def sft_step(
        self, sequences: Sequence[SupervisedSequence], lr: float | None = None
    ) -> dict[str, float]:
        """See `TrainEngine.sft_step`; also `memory/to_training_s` after vLLM's turn."""
        switch = await self._begin_training()
        learned = await self._train(self._trainer.sft_step, sequences, lr)
        self._note_holdings()
        return learned | switch

    async def nll(self, sequences: Sequence[SupervisedSequence]) -> dict[str, float]:
        """See `TrainEngine.nll`."""
        scored = await self._train(self._trainer.nll, sequences)
        await self._rest_unless_training()
        return scored

    async def _begin_training(self) -> dict[str, float]:
        """Take the trainer's memory again.

        Raises:
            RunError: vLLM holds memory that it should have given back.
        """
        if self._ledger.turn == "trainer":
            return {}
        self._ledger.begin("trainer")
        await self._train(self._trainer.reload)
        self._note_holdings()
        began = self._switch_began
        return {} if began is None else {"memory/to_training_s": time.perf_counter() - began}

    async def end_serving(self) -> dict[str, float]:
        """Let vLLM give its memory back, before any worker begins to train.

        A vLLM that has died has none: it is not missed before the next push.

        Returns:
            In GiB the physical memory that vLLM's workers hold now (`memory/vllm_while_training_gib`) and
            held before they had a model (`memory/vllm_without_model_gib`); nothing if there is no vLLM, or it
            is not to sleep.
        """
        self._switch_began = time.perf_counter()
        vllm = self._vllm
        if vllm is None or not self._spec.inference.sleep_while_training:
            return {}
        try:
            await vllm.engine.sleep()
            self._ledger.give_up("vllm")
            now, before = await vllm.engine.resident_memory()
        except EngineDeadError as error:
            await vllm.give_up(str(error))
            self._ledger.give_up("vllm")
            return {}
        return {"memory/vllm_while_training_gib": now / GIB, "memory/vllm_without_model_gib": before / GIB}

    async def end_training(self) -> None:
        """Let the trainer give back what it can, before any vLLM takes memory."""
        self._switch_began = time.perf_counter()
        await self._rest()
        self._ledger.give_up("trainer")

    async def begin_serving(self) -> dict[str, float]:
        """Wake vLLM up, for a push; returns `memory/to_serving_s`.

        A vLLM that has died is left dead: see `heartbeat`.

        Raises:
            RunError: the trainer holds memory that it should have given back.
        """
        self._ledger.begin("vllm")
        vllm = self._vllm
        if vllm is not None and not vllm.died and vllm.engine.asleep:
            try:
                await vllm.engine.wake_up()
            except EngineDeadError as error:
                await vllm.give_up(str(error))
        self._note_holdings()
        began = self._switch_began
        return {} if began is None else {"memory/to_serving_s": time.perf_counter() - began}

    async def _rest(self) -> None:
        """Let go of what this process needs for training, and for pushes, alone.

        Reading the trainer's weights, for a push, say, takes those pages again.
        """
        if self._spec.serves:
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
        if turn != "trainer" and self._vllm is not None:
            for kind, nbytes in self._vllm_bytes.items():
                stays = kind == "weights" and spec.vllm_keeps_weights and spec.device == "cpu"
                hold("vllm", kind, nbytes, spec.device, spec.inference.sleep_while_training and not stays)

    def _holdings(self, phase: str) -> dict[str, float]:
        return {f"memory/{phase}/{name}": gib for name, gib in self._ledger.gib().items()}

    async def reset_optimizer(self, lr: float) -> None:
        await self._train(self._trainer.reset_optimizer, lr)

    async def restart_engine(self) -> int:
        """Start vLLM again, with random weights; returns the number of its workers.

        Raises:
            EngineDeadError: it could not start.
        """
        assert self._vllm is not None
        await self._vllm.start()
        self._note_holdings()
        return self._vllm.num_receivers

    async def give_up_engine(self, why: str) -> None:
        """Kill a vLLM that does not answer."""
        assert self._vllm is not None
        await self._vllm.give_up(why)

    async def rest(self) -> dict[str, float]:
        """After a push: let go of what only training and pushes need.

        Returns:
            In GiB the physical memory that this process holds now (`memory/trainer_while_serving_gib`) and
            held before the trainer had a model (`memory/trainer_without_model_gib`), and what is held of
            which kind (`memory/serving/...`).
        """
        await self._rest()
        return {
            "memory/trainer_while_serving_gib": resident() / GIB,
            "memory/trainer_without_model_gib": self._resident_before / GIB,
            **self._holdings("serving"),
        }

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `TrainEngine.logprobs`."""
        scored = await self._train(self._trainer.logprobs, sequences)
        await self._rest_unless_training()
        return scored

    async def _rest_unless_training(self) -> None:
        if self._ledger.turn == "vllm":
            await self._rest()

    async def save(self, folder: str) -> None:
        """See `TrainEngine.save`: returns when the state has been copied; files are written later."""
        await self._train(self._trainer.save, folder)
        await self._rest_unless_training()

    async def saved(self) -> None:
        """See `TrainEngine.saved`."""
        await self._train(self._trainer.saved)

    async def load(self, folder: str) -> None:
        await self._train(self._trainer.load, folder)

    async def save_pretrained(self, folder: str) -> None:
        await self._train(self._trainer.save_pretrained, folder)
        await self._rest_unless_training()

    async def heartbeat(self) -> tuple[str, float]:
        """Answers at once, whatever is being computed.

        Returns:
            Why its vLLM is dead (empty: it lives, or is not here), and for how many seconds that has not
            answered.
        """
        vllm = self._vllm
        return ("", 0.0) if vllm is None else (vllm.died, vllm.silent_s)

    async def shutdown(self) -> None:
        if self._publisher is not None:
            await self._publisher.close()
        if self._vllm is not None:
            await self._vllm.shutdown()


def log_name(rank: int) -> str:
    """File of a worker's output."""
    return f"worker-{rank}.log"


def _use_cores(cores: Sequence[int]) -> None:
    """For all threads of this process, and those that they will start."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def _meet_at(address: str) -> None:
    """Let trainer ranks connect to this one at an address of this node.

    gloo would take what the host's name stands for, which is often a loopback address.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _import_engines(*modules: str) -> None:
    """Import before the engines start in two threads: these libraries' cyclic imports need one at a time.

    Nothing of it is ever freed: the collector need not look, now (a fifth of the time) or later.
    """
    gc.disable()
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()
