"""What the tests see and do inside vLLM's workers (`worker_extension_cls`)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

from k2rl.checkpoint_engine.receiver import Receiver, Step

_place = Receiver._place


class PushProbe:
    """Mixed into vLLM's worker."""

    rank: int

    def watch(self, fault: str = "", at: int = 0, rank: int = 0) -> int:
        """Count the bytes that are read from now on, and let a fault happen once.

        Args:
            fault: `kill`, `stop` or `raise`; empty: none.
            at: number of the step after whose placing it happens; later ones are not acknowledged.
            rank: of the worker that it happens to.

        Returns:
            The worker's process.
        """
        self._read = self._steps = 0

        def acting(place: Callable[[], None]) -> Callable[[], None]:
            def act() -> None:
                place()
                self._steps += 1
                if self.rank == rank and self._steps == at + 1:
                    if fault == "raise":
                        raise RuntimeError("out of luck")
                    if fault:
                        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

            return act

        def watched(steps: Iterable[Step], cell_bytes: int) -> dict[int, str]:
            steps = list(steps)
            self._read += sum(len(view) for views, _ in steps for _, view in views)
            return _place([(views, acting(place)) for views, place in steps], cell_bytes)

        Receiver._place = staticmethod(watched)  # type: ignore[method-assign]
        return os.getpid()

    def read_bytes(self) -> int:
        """Bytes that were hashed, and then placed, since `watch`."""
        return self._read

    def forget(self) -> None:
        """What earlier pushes have taught: the next is like the first."""
        worker: Any = self
        worker.__dict__.pop("weight_receiver", None)
