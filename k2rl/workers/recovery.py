"""How often what died may be started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from k2rl.errors import RunError
from k2rl.tracking.restarts import Restart, open_restarts


class Recovery:
    """The restarts of a run, over all starts of its workers; on record in the run's folder."""

    def __init__(self, run_dir: Path, max_restarts: int, resumed: bool = False) -> None:
        """`resumed`: the record goes on; what is in it does not count."""
        self.left = self._limit = max_restarts
        self._record = open_restarts(run_dir, resumed)
        self._tell: Callable[[str], None] = lambda text: None
        self._step: Callable[[], int] = lambda: 0
        #: Whether the workers have started once.
        self.began = False
        #: What was said of the last restart.
        self.last = ""

    @contextmanager
    def begun(self, tell: Callable[[str], None], step: Callable[[], int]) -> Iterator[None]:
        """While the workers run.

        Args:
            tell: how the user learns of restarts meanwhile.
            step: gives the last finished step.
        """
        self._tell, self._step, self.began = tell, step, True
        try:
            yield
        finally:
            self._tell = lambda text: None

    def spend(self, error: RunError) -> None:
        """What `error` tells of has died, and is about to be started again.

        Raises:
            RunError: `error` itself, if that has happened too often.
        """
        if self.left == 0:
            raise error
        self.left -= 1
        why = str(error).splitlines()[0].partition("; last lines of ")[0]
        self._record.write(Restart(self._step(), why))
        self.last = f"{why}; restart {self._limit - self.left} of recovery.max_restarts={self._limit}"
        self._tell(self.last)

    def close(self) -> None:
        self._record.close()
