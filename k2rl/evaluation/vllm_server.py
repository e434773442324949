"""vLLM's OpenAI-compatible server, which ends with the process that started it."""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import threading


def _follow(parent: int) -> None:
    handle = os.pidfd_open(parent)
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)
    select.select([handle], [], [])
    # This process leads a group: vLLM's engine core and workers are in it.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
