"""What vLLM's fork server imports.

All of it stays, so the collector would look in vain for what it could free: for a fifth of the imports'
time, and for half a second at every full collection in the processes that are forked.
"""

from __future__ import annotations

import gc
from importlib import import_module

gc.disable()
for _name in (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "k2rl.inference.vllm_worker",
):
    import_module(_name)
gc.freeze()
gc.enable()
