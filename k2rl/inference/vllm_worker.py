"""What runs inside vLLM's worker process: the platform's worker, which takes part in pushes of weights."""

from __future__ import annotations

import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
from torch import Tensor
from vllm import _custom_ops
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from k2rl.checkpoint_engine.messages import DeltaRefusedError, Outcome, PushInvitation
from k2rl.checkpoint_engine.vllm_modules import discard_packed
from k2rl.checkpoint_engine.vllm_receiver import WeightReceiver
from k2rl.diagnosis.activity import VLLM_WORKER
from k2rl.inference.rotation import rotate_natively
from k2rl.inference.routes import RECORD_ROUTES, RouteRecorder
from k2rl.workers.memory import release, resident, trim

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker

logger = init_logger(__name__)

#: In vLLM's `additional_config`: of the adapters that pushes bring.
ADAPTER_SCALE = "k2rl_adapter_scale"

#: Kernels kept for each shape of weights; a step uses one of them, for its number of tokens.
_KERNELS_KEPT = 2


def limit_kernel_caches() -> None:
    """Before the first product: keep few of the kernels that oneDNN compiles for each number of tokens.

    A batch that grows and shrinks has many, a quarter of a MiB each, and nothing frees them: oneDNN keeps
    1024, vLLM beside it 32 for each shape of weights. Compiling one again takes about a millisecond.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    create = _custom_ops.create_onednn_mm

    def create_with_few(weight: Tensor, primitive_cache_size: int = _KERNELS_KEPT) -> Any:
        return create(weight, min(primitive_cache_size, _KERNELS_KEPT))

    _custom_ops.create_onednn_mm = create_with_few


class ColocatedVLLMWorker(PlatformWorker):
    """A vLLM worker that shares its host (and devices) with the trainer."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        if current_platform.is_cpu():
            limit_kernel_caches()
            rotate_natively(self.vllm_config)
        self._resident_before = resident()
        super().load_model(*args, **kwargs)
        self._recorder: RouteRecorder | None = None
        if self.vllm_config.additional_config.get(RECORD_ROUTES):
            self._recorder = RouteRecorder(self.model_runner.get_model(), self.model_runner)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        with VLLM_WORKER.doing(f"a batch of {scheduler_output.total_num_scheduled_tokens} tokens"):
            output = super().execute_model(scheduler_output, *args, **kwargs)
        if self._recorder is not None and scheduler_output.total_num_scheduled_tokens:
            self._recorder.note()
        return output

    def take_routes(self, requests: list[str]) -> bytes:
        """`RouteRecorder.take`, encoded."""
        assert self._recorder is not None
        return msgspec.msgpack.encode(self._recorder.take(requests))

    def resident_memory(self) -> tuple[int, int]:
        """Bytes of physical memory that this process holds, and that it held before it had a model."""
        return resident(), self._resident_before

    def sleep(self, level: int = 1) -> None:
        """Give back the KV cache's memory, from level 2 on also the weights'.

        On a GPU through vLLM's own allocator, which moves weights to the host at level 1. On a CPU, where
        vLLM does nothing, the pages are given back and the addresses stay, so that nobody who holds a tensor
        need know.
        """
        if level > 1 and "weight_receiver" in self.__dict__:
            self.weight_receiver.forget()
        if not current_platform.is_cpu():
            super().sleep(level)
            return
        model, tensors = self.model_runner.get_model(), list(self.model_runner.kv_caches)
        # Written before it is read, and by models alone that take more than token ids.
        tensors.append(self.model_runner.inputs_embeds.cpu)
        if level > 1:
            tensors += list(model.parameters())
            discard_packed(model)
        release(tensors)
        if "weight_receiver" in self.__dict__:
            self.weight_receiver.unload()
        trim()

    def wake_up(self, tags: list[str] | None = None) -> None:
        # On a CPU the pages come back as they are used.
        if not current_platform.is_cpu():
            super().wake_up(tags)

    @cached_property
    def weight_receiver(self) -> WeightReceiver:
        model = self.model_runner.get_model()
        scale = self.vllm_config.additional_config.get(ADAPTER_SCALE)
        return WeightReceiver(model, self.vllm_config.model_config, self.device, self.rank, scale)

    def take_part(self, invitation: bytes) -> bytes:
        """Receive a push, from an encoded `PushInvitation`; returns an encoded `Outcome`.

        It never raises: of a call that raises in one rank, vLLM leaves the other ranks' answers unread, and
        takes them for the answers to its next call.
        """
        try:
            with VLLM_WORKER.doing("taking part in a push"), set_current_vllm_config(self.vllm_config):
                self.weight_receiver.take_part(msgspec.msgpack.decode(invitation, type=PushInvitation))
        except Exception as error:
            refused = isinstance(error, DeltaRefusedError)
            if not refused:
                logger.exception("a push of weights failed")
            return msgspec.msgpack.encode(Outcome(f"{type(error).__name__}: {error}", refused))
        self.model_runner.reset_lora_state()
        return msgspec.msgpack.encode(Outcome())

    def weight_needs(self) -> bytes:
        """`WeightReceiver.needs`, encoded."""
        return msgspec.msgpack.encode(self.weight_receiver.needs)
