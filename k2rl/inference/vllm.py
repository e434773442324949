"""vLLM behind the `InferenceEngine` protocol: the same class on CPU and CUDA."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from k2rl.checkpoint_engine.messages import (
    FAREWELL_S,
    Address,
    DeltaRefusedError,
    Outcome,
    PushInvitation,
    TransferError,
)
from k2rl.checkpoint_engine.plan import Box, Needs
from k2rl.config import InferenceConfig
from k2rl.diagnosis.activity import FRONT_END
from k2rl.inference.engine import EngineDeadError, FinishReason, Generation, GenerationError, Sampling
from k2rl.inference.prefork import adopt, start_server
from k2rl.types import NO_WEIGHT_VERSION
from k2rl.workers.process import OWNER_PID, remove, shared_memory_of

T = TypeVar("T")
_NEEDS = dict[str, tuple[Box, ...]]

#: How often a call of the engine core looks whether that still lives.
HEALTH_INTERVAL_S = 0.5

# vLLM's CPU runner cannot take back a token it sampled with a request's own seed, which it must after
# a partial prefill; so prompts are prefilled whole. Its default KV block of 128 tokens is longer than many
# prompts, and only whole blocks are shared between the responses of a group.
_CPU_ARGUMENTS: dict[str, Any] = {"enable_chunked_prefill": False, "block_size": 32}


def _cpu_binding(setting: str, ranks: int, cores: Sequence[int]) -> str:
    """vLLM's spelling of the cores to use, a set for each tensor-parallel rank; `all` is all of `cores`.

    Its `auto` would leave one idle for a scheduler that sleeps.
    """
    if setting != "all":
        return setting
    share = max(len(cores) // ranks, 1)
    # With fewer cores than ranks, some have to share one.
    sets = [[cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in own) for own in sets)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


class VLLMEngine:
    """An `AsyncLLM` that starts with random weights and serves only what was pushed into it.

    Starting from random weights is what makes the start-up self-check mean something: a parameter
    that a push fails to reach cannot look right by accident.
    """

    def __init__(
        self,
        model_path: Path,
        dtype: str,
        stop_token_ids: tuple[int, ...],
        config: InferenceConfig,
        seed: int,
        cores: Sequence[int] = (),
        adapter_scale: float | None = None,
        keeps_weights: bool = False,
    ) -> None:
        """Configure the engine; `start` starts it.

        vLLM sets environment variables for it: native code that reads one at that moment, in another thread,
        crashes.

        Args:
            model_path: folder of the checkpoint whose configuration and shapes the model has.
            dtype: that it computes in.
            stop_token_ids: end a turn.
            config: of the engine.
            seed: of vLLM's own generator.
            cores: that it may use on a CPU; default: those that this process may.
            adapter_scale: where pushes bring adapters: what their products are multiplied by.
            keeps_weights: when it sleeps, for pushes that build on what it has.

        Raises:
            EngineDeadError: vLLM takes no such configuration.
        """
        os.environ[OWNER_PID] = str(os.getpid())
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _cpu_binding(
            config.cpu_threads_bind, config.tensor_parallel, cores or sorted(os.sched_getaffinity(0))
        )
        os.environ.setdefault("VLLM_LOGGING_COLOR", "0")
        start_server()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        arguments: dict[str, Any] = {
            "model": str(model_path),
            "dtype": dtype,
            "seed": seed,
            "load_format": "dummy",
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "tensor_parallel_size": config.tensor_parallel,
            # In a placement group of Ray's it would else look for its workers there.
            "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else None,
            "enforce_eager": config.enforce_eager,
            "enable_prefix_caching": True,
            # Log-probs of what was really sampled from: after the temperature.
            "logprobs_mode": "processed_logprobs",
            # As many as a judge has words to choose from.
            "max_logprobs": -1,
            # Its allocator can give memory back.
            "enable_sleep_mode": not current_platform.is_cpu(),
            "worker_cls": "k2rl.inference.vllm_worker.ColocatedVLLMWorker",
            # Text is the environments' and judges' business; ids in, ids out.
            "skip_tokenizer_init": True,
            **(_CPU_ARGUMENTS if current_platform.is_cpu() else {}),
            "max_num_batched_tokens": max(8192, config.max_model_len),
            **config.engine_args,
        }
        ours: dict[str, Any] = {} if adapter_scale is None else {"k2rl_adapter_scale": adapter_scale}
        if config.return_routed_experts and current_platform.is_cpu():
            # vLLM's own way needs its Model Runner V2, and that Triton.
            ours["k2rl_record_routes"] = True
        elif config.return_routed_experts:
            arguments["enable_return_routed_experts"] = True
        if ours:
            arguments["additional_config"] = {**(arguments.get("additional_config") or {}), **ours}
        try:
            self._vllm_config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.ENGINE_CONTEXT)
        except (RuntimeError, TypeError, ValueError) as error:
            raise EngineDeadError(f"vLLM did not start: {error}") from error
        #: Number of the host it is on, where weights come to several.
        self.host = 0
        self._stop_token_ids = list(stop_token_ids)
        self._running_requests = config.running_requests
        #: vLLM's: 1 keeps the weights (on a GPU, in the host's memory).
        self._sleep_level = 1 if keeps_weights else 2
        self._returns_routes = config.return_routed_experts
        #: Requests that failed: nobody asks which experts computed them.
        self._forgotten: list[str] = []
        self._kv_cache_gib = config.kv_cache_gib
        self._request_ids = itertools.count()
        self._running: set[str] = set()
        #: Of those, the ones that were asked to end early, and keep what they have.
        self._interrupted: set[str] = set()
        self._version = NO_WEIGHT_VERSION
        self._fenced = True
        self._paused = False
        self._asleep = False
        self._ended = False
        self._push: asyncio.Future[None] | None = None
        self._settle_s = 0.0
        self._needs: tuple[Needs, ...] | None = None
        self._pushed_until: float | None = time.monotonic()

    def start(self) -> VLLMEngine:
        """Start vLLM's processes; blocks until they are ready.

        Raises:
            EngineDeadError: vLLM could not start; its reason is in the log.
        """
        from vllm.v1.engine.async_llm import AsyncLLM

        adopt()
        others = _descendants()
        try:
            self._llm = AsyncLLM.from_vllm_config(self._vllm_config)
        except (RuntimeError, TypeError, ValueError) as error:
            # vLLM's log names arguments of its own, which are not where a run sets this.
            memory = f"if it is short of memory, lower inference.kv_cache_gib={self._kv_cache_gib:g}"
            raise EngineDeadError(f"vLLM did not start: {error}; {memory}") from error
        self._processes = _descendants() - others
        pids = [process.pid for process in self._processes]
        self._segments = shared_memory_of(*pids) - shared_memory_of(os.getpid())
        return self

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Sample one turn; see `InferenceEngine.generate`.

        Raises:
            RuntimeError: no verified weights have been published yet, or the last push failed.
            GenerationError: vLLM aborted the request.
            EngineDeadError: vLLM died.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        if self._fenced:
            raise RuntimeError("the engine is fenced: it holds no completely verified version of the weights")
        parameters = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=len(sampling.allowed),
            detokenize=False,
            stop_token_ids=self._stop_token_ids,
            allowed_token_ids=list(sampling.allowed) or None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            repetition_detection=RepetitionDetectionParams(sampling.repeat_size, 0, sampling.repeat_count)
            if sampling.repeat_size
            else None,
        )
        request_id = f"request-{next(self._request_ids)}"
        self._running.add(request_id)
        try:
            stream = self._llm.generate({"prompt_token_ids": prompt_ids}, parameters, request_id)
            with FRONT_END.doing("waiting for vLLM: generating"):
                output = (await self._while_alive(_last(stream))).outputs[0]
        except VLLMEngineDeadError as error:
            raise EngineDeadError(str(error)) from error
        except BaseException:
            self._forgotten.append(request_id)
            raise
        finally:
            self._running.discard(request_id)
            interrupted = request_id in self._interrupted
            self._interrupted.discard(request_id)
        reason: FinishReason = (
            "interrupted" if interrupted and output.finish_reason == "abort" else output.finish_reason
        )
        known = len(prompt_ids) + max(len(output.token_ids) - 1, 0)
        routes = await self._routes(request_id, output)
        if reason not in ("stop", "length", "repetition", "interrupted"):
            raise GenerationError(f"vLLM ended {request_id} with {reason!r}, not at its turn's end")
        token_ids = tuple(output.token_ids)
        logprobs = tuple(
            position[token].logprob for position, token in zip(output.logprobs or (), token_ids, strict=True)
        )
        first = output.logprobs[0] if output.logprobs else {}
        allowed = tuple(first[token].logprob for token in sampling.allowed if first)
        spans = tuple((span.start, int(span.version)) for span in output.weight_versions or ())
        if routes and token_ids and len(routes) < known:
            raise GenerationError(f"vLLM says of {len(routes)} positions of {known} which experts they had")
        return Generation(token_ids, logprobs, spans, reason, routes[:known], allowed)

    async def _routes(self, request_id: str, output: Any) -> tuple[bytes, ...]:
        """Which experts computed each position of a request that has ended, if that is asked for."""
        if not self._returns_routes:
            return ()
        if output.routed_experts is not None:
            return tuple(row.astype("uint16").tobytes() for row in output.routed_experts)
        forgotten, self._forgotten = self._forgotten, []
        taken = (await self._call_workers("take_routes", [request_id, *forgotten]))[0]
        return msgspec.msgpack.decode(taken, type=dict[str, tuple[bytes, ...]]).get(request_id, ())

    async def interrupt(self) -> None:
        """See `InterruptibleEngine.interrupt`."""
        running = sorted(self._running)
        self._interrupted |= self._running
        if running:
            await self._call_engine(self._llm.abort(running))

    @property
    def num_receivers(self) -> int:
        """Its workers, each of which is a receiver of a push: its tensor-parallel ranks."""
        return int(self._llm.vllm_config.parallel_config.world_size)

    @property
    def needs(self) -> tuple[Needs, ...] | None:
        """What each worker reads of a push; None before the first one, from which the workers learn it."""
        return self._needs

    async def join_push(
        self, address: Address, version: int, deadline_s: float, first_receiver: int = 0
    ) -> None:
        """Pause, keeping or aborting the requests as configured, and let the workers take part in a push.

        The engine is fenced from here to the commit; if anything fails it stays so, and only another
        complete push lifts the fence.

        Args:
            address: of the push's coordinator.
            version: that it brings.
            deadline_s: longest silence of the coordinator.
            first_receiver: number of its first worker; the others follow.

        Raises:
            ValueError: the version is not newer than the one in place, or the engine sleeps.
            EngineDeadError: vLLM died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        # One that holds parts of a push that failed may go back to the version before.
        if version < self._version or (version == self._version and not self._fenced):
            raise ValueError(f"version {version} is not newer than {self._version}")
        try:
            # A paused engine counts as sleeping, too; after a push that failed it is paused.
            if not self._paused and await self._while_alive(self._llm.is_sleeping()):
                raise ValueError("the engine sleeps: wake it up before pushing weights into it")
            self._fenced = self._paused = True
            await self._while_alive(self._llm.pause_generation(mode=self._running_requests, clear_cache=True))
        except VLLMEngineDeadError as error:
            raise EngineDeadError(str(error)) from error
        self._settle_s = deadline_s + FAREWELL_S
        self._push = asyncio.ensure_future(self._take_part(address, version, deadline_s, first_receiver))

    async def push_ended(self) -> None:
        """Wait until the workers have left the push; raises what they failed with."""
        if self._push is not None:
            await asyncio.shield(self._push)

    async def _take_part(
        self, address: Address, version: int, deadline_s: float, first_receiver: int
    ) -> None:
        self._pushed_until = None
        try:
            await self._receive(PushInvitation(address, deadline_s, first_receiver, self.host), version)
        finally:
            self._pushed_until = time.monotonic()

    async def _receive(self, invited: PushInvitation, version: int) -> None:
        invitation = msgspec.msgpack.encode(invited)
        answers = await self._call_workers("take_part", invitation)
        outcomes = [msgspec.msgpack.decode(answer, type=Outcome) for answer in answers]
        numbered = enumerate(outcomes, invited.first_receiver)
        failed = "; ".join(
            f"receiver {number}: {outcome.error}" for number, outcome in numbered if outcome.error
        )
        if any(outcome.refused for outcome in outcomes):
            raise DeltaRefusedError(failed)
        if failed:
            raise TransferError(failed)
        if self._needs is None:
            answers = await self._call_workers("weight_needs")
            self._needs = tuple(msgspec.msgpack.decode(answer, type=_NEEDS) for answer in answers)
        try:
            await self._while_alive(self._llm.update_weight_version(str(version)))
            await self._while_alive(self._llm.resume_generation())
        except Exception as error:
            raise EngineDeadError(f"vLLM does not resume: {error}") from error
        self._version, self._fenced, self._paused = version, False, False

    @property
    def asleep(self) -> bool:
        return self._asleep

    async def sleep(self) -> None:
        """Give the memory of weights (unless they are kept) and KV cache back; requests are aborted.

        The engine is fenced until it was woken up and has received a push.

        Raises:
            EngineDeadError: vLLM died.
        """
        self._fenced = self._asleep = True
        await self._call_engine(self._llm.sleep(level=self._sleep_level))

    async def wake_up(self) -> None:
        """Take the memory again, for the push that is to fill it; raises as `sleep`."""
        await self._call_engine(self._llm.wake_up())
        self._asleep = False

    async def resident_memory(self) -> tuple[int, int]:
        """Bytes of physical memory that its workers hold, and that they held before they had a model.

        Raises:
            EngineDeadError: vLLM died.
        """
        answers = await self._call_workers("resident_memory")
        return sum(now for now, _ in answers), sum(before for _, before in answers)

    async def _call_engine(self, call: Awaitable[object]) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        try:
            await self._while_alive(call)
        except VLLMEngineDeadError as error:
            raise EngineDeadError(str(error)) from error

    async def _call_workers(self, method: str, *arguments: object) -> list[Any]:
        """Each worker's answer, which tells of its own failures: what is raised is vLLM's own."""
        try:
            with FRONT_END.doing(f"waiting for vLLM's workers: {method}"):
                answers: list[Any] = await self._while_alive(self._llm.collective_rpc(method, args=arguments))
            return answers
        except Exception as error:
            raise EngineDeadError(f"vLLM cannot call its workers any more: {error}") from error

    async def _while_alive(self, call: Awaitable[T]) -> T:
        """The result of a call of the engine core; vLLM itself would wait for one that has died.

        Also for one that we have killed: its front end is stopped before it has noticed.
        """
        answer = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait([answer], timeout=HEALTH_INTERVAL_S))[0]:
                if self._ended or self._llm.errored:
                    raise EngineDeadError("vLLM's engine core died")
            return answer.result()
        finally:
            answer.cancel()

    async def push_settled(self) -> BaseException | None:
        """Wait until the engine has left the push; returns why it does not serve what was pushed.

        Its workers leave within the push's deadline; one that hangs is as good as dead.
        """
        push, self._push = self._push, None
        if push is None:
            return None
        done, _ = await asyncio.wait([push], timeout=self._settle_s)
        if not done:
            push.cancel()
            return EngineDeadError(f"vLLM did not leave the push within {self._settle_s:g} s")
        return push.exception()

    @property
    def version(self) -> int:
        return self._version

    async def check_health(self) -> None:
        """Raises:
        EngineDeadError: vLLM is gone.
        """
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        try:
            await self._llm.check_health()
        except VLLMEngineDeadError as error:
            raise EngineDeadError(str(error)) from error

    @property
    def pushed_until(self) -> float | None:
        """When the last push was over, on the monotonic clock; None while one is under way.

        In a push its workers answer to nobody else.
        """
        return self._pushed_until

    async def answer(self) -> None:
        """Return as soon as its processes do: between two batches, and after a push.

        Raises:
            EngineDeadError: vLLM died.
        """
        await self._call_workers("resident_memory")

    def kill(self) -> None:
        """End vLLM's processes at once, also if they stand still; who waits for it finds it dead."""
        self._ended = True
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def shutdown(self) -> None:
        """Stop vLLM's processes; the engine is of no use afterwards."""
        self._ended = True
        try:
            self._llm.shutdown()
        except psutil.NoSuchProcess:
            # One ended by itself while vLLM was about to kill it. It has left its sockets open, for which
            # the end of their context would wait for ever.
            self.kill()
            self._llm.engine_core.resources()
        # What its processes would have removed themselves, had they not been killed.
        remove(self._segments)
        # Its finaliser would try again while the interpreter is being taken down.
        del self._llm


async def _last(stream: AsyncIterator[T]) -> T:
    return [item async for item in stream][-1]
