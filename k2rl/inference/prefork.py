"""vLLM's processes, forked from a server that has imported vLLM while its owner was starting.

vLLM spawns its engine core, and that its workers, one after the other, and each imports torch and vLLM for
itself: some eight seconds of a core every time. multiprocessing's fork server does it once, beside its
owner's own imports. When it forks it has only imported: a fork loses no OpenMP thread and no CUDA context.
"""

from __future__ import annotations

import os
import re
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess

import setproctitle

from k2rl.diagnosis import activity
from k2rl.workers.process import follow_owner_in_death

#: What the server imports; `__main__` is what each process would run again for itself.
_MODULES = ["__main__", "k2rl.inference.preloaded"]

#: Where vLLM says which cores a worker's threads get, for the OpenMP runtime that it found.
_PLACES = ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


class PreforkedProcess(ForkServerProcess):
    """Has the environment that a spawned process would have, and ends with its owner."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        # It finds where the title is kept with the help of the environment that the process began with.
        setproctitle.getproctitle()
        os.environ.clear()
        os.environ.update(self._environment)
        _bind_threads()
        follow_owner_in_death()
        activity.inherit(self.name)
        # A process below the server has none by Python's reckoning, and would start a second one.
        forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]
        adopt()
        super().run()


class PreforkContext(ForkServerContext):
    """A multiprocessing context of such processes."""

    Process = PreforkedProcess


def start_server() -> None:
    """Let the server start to import, if there is none yet; returns at once."""
    forkserver.set_forkserver_preload(_MODULES)
    forkserver.ensure_running()


def adopt() -> None:
    """Let vLLM fork the processes that it starts from this one."""
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    utils.get_mp_context = multiproc_executor.get_mp_context = PreforkContext


def _bind_threads() -> None:
    """Bind a worker's OpenMP threads as its environment says: OpenMP itself has read the server's.

    Unbound, two threads on two cores generated a quarter less.
    """
    places = [os.environ[name] for name in _PLACES if name in os.environ]
    if not places:
        return
    import torch

    cores = [int(core) for core in re.findall(r"\d+", places[0])]
    torch.set_num_threads(len(cores))
    before = _threads()
    torch.zeros(len(cores) << 16).add_(1.0)  # large enough to start them all
    for thread, core in zip([0, *sorted(_threads() - before)], cores, strict=False):
        os.sched_setaffinity(thread, {core})


def _threads() -> set[int]:
    return {int(thread) for thread in os.listdir("/proc/self/task")}  # noqa: PTH208  (names, not paths)
