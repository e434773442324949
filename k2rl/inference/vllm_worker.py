"""What runs inside vLLM's worker process: the platform's worker, with our weight receiver registered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

import k2rl.checkpoint_engine.vllm_receiver  # noqa: F401  (registers the weight-transfer engine)

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker


class ColocatedVLLMWorker(PlatformWorker):
    """A vLLM worker that shares its host (and devices) with the trainer."""
