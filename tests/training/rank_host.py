"""Processes that are ranks of a train engine: each runs the same jobs, one after the other."""

from __future__ import annotations

import multiprocessing
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from k2rl.training.ranks import Ranks

DEADLINE_S = 90.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["k2rl.training.engine", "transformers.models.llama.modeling_llama"])


class Failure(NamedTuple):
    """What a job raised."""

    kind: str
    message: str
    trace: str


def _serve(rank: int, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        work, arguments, address, world, deadline_s = job
        try:
            pipe.send(work(Ranks(rank, world, address, deadline_s), *arguments))
        except Exception as error:  # noqa: BLE001  the test is told
            pipe.send(Failure(type(error).__name__, str(error), traceback.format_exc()))


class RankHosts:
    """So many processes; they must be closed."""

    def __init__(self, count: int) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(
        self,
        work: Callable[..., Any],
        *arguments: Any,
        deadline_s: float = DEADLINE_S,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Let all ranks, or some of them, do `work(Ranks, *arguments)`; it must be importable."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        for rank in range(len(self.pipes)) if ranks is None else ranks:
            self.pipes[rank].send((work, arguments, address, len(self.pipes), deadline_s))

    def answer(self, rank: int) -> Any:
        assert self.pipes[rank].poll(DEADLINE_S), f"rank {rank} does not answer"
        return self.pipes[rank].recv()

    def run(self, work: Callable[..., Any], *arguments: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
        """What each rank's work returned; a `Failure` is an error of the test."""
        self.start(work, *arguments, deadline_s=deadline_s)
        answers = [self.answer(rank) for rank in range(len(self.pipes))]
        for answer in answers:
            assert not isinstance(answer, Failure), answer.trace
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)
        for pipe in self.pipes:
            pipe.close()
