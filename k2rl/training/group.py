"""How the ranks of a train engine act as one: sums, exchanges, and failures that all of them see.

A failure is either agreed on between two collectives (`agreed`), after which the group goes on, or it breaks
the group off (`call`): then somebody waits in vain in a collective. Who that is due to is found through the
store at which the ranks have met: a thread of each rank answers there, whatever the rank computes.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from k2rl.diagnosis.activity import TRAINER
from k2rl.errors import ConfigError, RunError
from k2rl.training.ranks import Ranks

T = TypeVar("T")

GRACE_S = 5.0
"""How long a live rank may take to say that it is one."""
_POLL_S = 0.5
_TROUBLE = "trouble"
_MARKS = ("gloo", "pair closure")
_SHARED = (ConfigError, RunError, ValueError)
"""What may be agreed on; anything else is a fault of the program."""


class Group:
    """A rank that is alone: everything is local, and errors are what they are."""

    rank = 0
    world = 1

    def sum(self, values: Tensor) -> Tensor:
        """Add up a CPU tensor over all ranks, in place."""
        return values

    def gather(self, value: T) -> list[T]:
        """Each rank's value, by rank."""
        return [value]

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the ranks' values, element by element, in place in a CPU tensor."""
        return values

    def most(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self.largest(torch.tensor(value)))

    def agreed(self, work: Callable[[], T]) -> T:
        """Do something local; if that fails on a rank, all fail with the error of the first that did.

        Only `ConfigError`, `RunError` and `ValueError` are shared so.
        """
        return work()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around all that a public method does; tells errors that were agreed on from those that break us."""
        yield

    def new_group(self) -> Group:
        """The same ranks once more, for use by another thread."""
        return self

    def close(self) -> None:
        """Leave."""


class DistributedGroup(Group):
    """Ranks in processes of their own: gloo for what lies in the CPU's memory, NCCL for the GPU's."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        """Meet the others.

        Raises:
            RunError: they did not come within the deadline.
        """
        self.rank, self.world = ranks.rank, ranks.world
        self._deadline = timedelta(seconds=ranks.deadline_s)
        self._broken: RunError | None = None
        self._agreed: BaseException | None = None
        self._store = _meet(ranks)
        try:
            dist.init_process_group(
                "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
                store=self._store,
                rank=self.rank,
                world_size=self.world,
                timeout=self._deadline,
            )
            #: Of the devices that compute, and of the hosts' memory.
            self.mesh: DeviceMesh = init_device_mesh(device.type, (self.world,))
            self.host_mesh: DeviceMesh = init_device_mesh("cpu", (self.world,))
            self.process_group = dist.group.WORLD
            self._names = self.gather(f"process {os.getpid()} on {socket.gethostname()}")
        except RuntimeError as error:
            if dist.is_initialized():
                dist.destroy_process_group()
            raise RunError(_not_met(ranks, error)) from error
        self._watch = _Watch(ranks)

    def sum(self, values: Tensor) -> Tensor:
        with TRAINER.doing("waiting for the other ranks in a collective"):
            dist.all_reduce(values, group=self.process_group)
        return values

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world
        with TRAINER.doing("waiting for the other ranks in a collective"):
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.process_group)
        return values

    def agreed(self, work: Callable[[], T]) -> T:
        try:
            result = work()
            failed = None
        except _SHARED as error:
            failed = error
        if self.most(failed is not None):
            errors = self.gather(failed and (_kind(failed), str(failed)))
            first = next(rank for rank, error in enumerate(errors) if error)
            kind, message = errors[first] or ("", "")
            ours = failed if first == self.rank and failed else _kinds()[kind](message)
            self._agreed = ours
            raise ours
        return result

    @contextmanager
    def call(self) -> Iterator[None]:
        if self._broken:
            raise self._broken
        try:
            yield
        except BaseException as error:
            if error is self._agreed:
                raise
            self._broken = self._break_off(error)
            if not isinstance(error, Exception):
                raise
            raise self._broken from error

    def new_group(self) -> Group:
        other = copy(self)
        other.process_group = dist.new_group(backend="gloo", timeout=self._deadline)
        return other

    def close(self) -> None:
        self._watch.stop()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _break_off(self, error: BaseException) -> RunError:
        """Say in the store that we stop and why, and find out whose fault it is.

        A rank that waited for another in vain has torch's error; any other error is the rank's own.
        """
        waited = isinstance(error, (dist.DistError, RuntimeError)) and _is_collective(error)
        mine = "" if waited else f"{self._name(self.rank)} broke off: {_one_line(error)}"
        try:
            self._store.set(f"stopped/{self.rank}", mine)
            self._store.set(_TROUBLE, "1")
            if mine:
                return RunError(mine)
            silent = set(range(self.world))
            end = time.monotonic() + GRACE_S
            while time.monotonic() < end:
                for rank in range(self.world):
                    if self._store.check([f"stopped/{rank}"]):
                        silent.discard(rank)
                        if told := self._store.get(f"stopped/{rank}").decode():
                            return RunError(told)
                    elif self._store.check([f"alive/{rank}"]):
                        silent.discard(rank)
                time.sleep(_POLL_S / 10)
                if not silent:
                    end = min(end, time.monotonic() + _POLL_S)
        except RuntimeError:
            silent = {0}  # the store is rank 0's
        if not silent:
            return RunError(f"the ranks of the trainer lost each other, all of them run: {_one_line(error)}")
        gone = ", ".join(self._name(rank) for rank in sorted(silent))
        return RunError(f"{gone} is gone or hangs: {_one_line(error)}")

    def _name(self, rank: int) -> str:
        return f"trainer rank {rank} of {self.world} ({self._names[rank]})"


class _Watch:
    """Says that this rank lives, once anybody asks, over a connection of its own."""

    def __init__(self, ranks: Ranks) -> None:
        self._store = _connect(ranks, master=False)
        self._rank = ranks.rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainer-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                if self._store.check([_TROUBLE]):
                    self._store.set(f"alive/{self._rank}", "1")
                    return
            except RuntimeError:
                return  # rank 0 is gone, and the store with it

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def _meet(ranks: Ranks) -> TCPStore:
    try:
        return _connect(ranks, master=ranks.rank == 0)
    except RuntimeError as error:
        raise RunError(_not_met(ranks, error)) from error


def _connect(ranks: Ranks, master: bool) -> TCPStore:
    host, _, port = ranks.address.rpartition(":")
    return TCPStore(
        host.strip("[]"),
        int(port),
        ranks.world,
        is_master=master,
        timeout=timedelta(seconds=ranks.deadline_s),
        wait_for_workers=False,
    )


def _not_met(ranks: Ranks, error: Exception) -> str:
    return (
        f"trainer rank {ranks.rank} of {ranks.world} did not meet the others at {ranks.address} within "
        f"{ranks.deadline_s:g} s: {_one_line(error)}"
    )


def _is_collective(error: BaseException) -> bool:
    """Whether a `RuntimeError` is of a collective: gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or any(mark in str(error) for mark in _MARKS)


def _kinds() -> dict[str, type[Exception]]:
    return {kind.__name__: kind for kind in _SHARED}


def _kind(error: Exception) -> str:
    return next(kind.__name__ for kind in _SHARED if isinstance(error, kind))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
