"""vLLM behind the `InferenceEngine` protocol: the same class on CPU and CUDA."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import msgspec

from k2rl.checkpoint_engine.manifest import Manifest
from k2rl.config import InferenceConfig
from k2rl.inference.engine import EngineDeadError, Generation, GenerationError, Sampling
from k2rl.types import NO_WEIGHT_VERSION
from k2rl.workers.process import OWNER_PID

# vLLM's CPU runner cannot take back a token it sampled with a request's own seed, which it must after
# a partial prefill; so prompts are prefilled whole. Its default KV block of 128 tokens is longer than many
# prompts, and only whole blocks are shared between the responses of a group.
_CPU_ARGUMENTS: dict[str, Any] = {"enable_chunked_prefill": False, "block_size": 32}


def _cpu_binding(setting: str) -> str:
    """vLLM's spelling of the cores to use; its `auto` would leave one idle for a scheduler that sleeps."""
    if setting != "all":
        return setting
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))


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
    ) -> None:
        """Start the engine; blocks until it is ready.

        Raises:
            EngineDeadError: vLLM could not start; its reason is in the log.
        """
        os.environ[OWNER_PID] = str(os.getpid())
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = _cpu_binding(config.cpu_threads_bind)
        os.environ.setdefault("VLLM_LOGGING_COLOR", "0")
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from k2rl.checkpoint_engine.receiver import BACKEND

        arguments: dict[str, Any] = {
            "model": str(model_path),
            "dtype": dtype,
            "seed": seed,
            "load_format": "dummy",
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "enforce_eager": config.enforce_eager,
            "enable_prefix_caching": True,
            # Log-probs of what was really sampled from: after the temperature.
            "logprobs_mode": "processed_logprobs",
            "worker_cls": "k2rl.inference.vllm_worker.ColocatedVLLMWorker",
            "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
            # Text is the environments' and judges' business; ids in, ids out.
            "skip_tokenizer_init": True,
            **(_CPU_ARGUMENTS if current_platform.is_cpu() else {}),
            "max_num_batched_tokens": max(8192, config.max_model_len),
            **config.engine_args,
        }
        try:
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (RuntimeError, TypeError, ValueError) as error:
            raise EngineDeadError(f"vLLM did not start: {error}") from error
        self._stop_token_ids = list(stop_token_ids)
        self._request_ids = itertools.count()
        self._version = NO_WEIGHT_VERSION
        self._fenced = True

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        """Sample one turn; see `InferenceEngine.generate`.

        Raises:
            RuntimeError: no verified weights have been published yet, or the last push failed.
            GenerationError: vLLM aborted the request.
            EngineDeadError: vLLM died.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        if self._fenced:
            raise RuntimeError("the engine is fenced: it holds no completely verified version of the weights")
        parameters = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=self._stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request_id = f"request-{next(self._request_ids)}"
        try:
            stream = self._llm.generate({"prompt_token_ids": prompt_ids}, parameters, request_id)
            output = [item async for item in stream][-1].outputs[0]
        except VLLMEngineDeadError as error:
            raise EngineDeadError(str(error)) from error
        if output.finish_reason not in ("stop", "length"):
            raise GenerationError(
                f"vLLM ended {request_id} with {output.finish_reason!r}, not at its turn's end"
            )
        token_ids = tuple(output.token_ids)
        logprobs = tuple(
            position[token].logprob for position, token in zip(output.logprobs, token_ids, strict=True)
        )
        spans = tuple((span.start, int(span.version)) for span in output.weight_versions or ())
        return Generation(token_ids, logprobs, spans, output.finish_reason)

    async def update_weights(self, manifest: Manifest) -> None:
        """Put a push in place: pause, receive, verify, commit the version, resume.

        The engine is fenced from the first byte to the commit; if anything fails it stays so, and
        only another complete push lifts the fence.

        Raises:
            ValueError: the version is not newer than the one in place.
            EngineDeadError: vLLM died.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
        from vllm.v1.engine.exceptions import EngineDeadError as VLLMEngineDeadError

        if manifest.version <= self._version:
            raise ValueError(f"version {manifest.version} is not newer than {self._version}")
        self._fenced = True
        try:
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            await self._llm.start_weight_update()
            await self._llm.update_weights(
                WeightTransferUpdateRequest(update_info={"manifest": msgspec.to_builtins(manifest)})
            )
            await self._llm.finish_weight_update(str(manifest.version))
            await self._llm.resume_generation()
        except VLLMEngineDeadError as error:
            raise EngineDeadError(str(error)) from error
        self._version, self._fenced = manifest.version, False

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

    def shutdown(self) -> None:
        """Stop vLLM's processes; the engine is of no use afterwards."""
        self._llm.shutdown()
        # Its finaliser would try again while the interpreter is being taken down.
        del self._llm
