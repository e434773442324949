"""What oneDNN keeps of the kernels that it compiled, in a process of its own: nothing gives it back."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import torch
from vllm import _custom_ops as ops
from k2rl.inference.vllm_worker import limit_kernel_caches
from k2rl.workers.memory import resident, trim

assert ops._supports_onednn
limit_kernel_caches()
handlers = [ops.create_onednn_mm(torch.randn(size, 576).t(), 32) for size in (576, 960)]

def batches(sizes):
    for size in sizes:
        for handler in handlers:
            ops.onednn_mm(handler, torch.randn(size, 576), None)
    trim()
    return resident()

before = batches((200, 7))
assert batches(range(8, 200, 3)) - before < 8 * 2**20, resident() - before
"""


def test_a_batch_that_shrinks_leaves_no_kernels_behind() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
