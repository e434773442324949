"""A run's folder belongs to one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from k2rl.errors import ConfigError

LOCK_FILE = ".lock"


@contextmanager
def owned(run_dir: Path, fresh: bool) -> Iterator[None]:
    """Own a run's folder; the system takes the ownership back when the process ends, however it ends.

    Args:
        run_dir: made if there is none.
        fresh: whether a new run begins in it.

    Raises:
        ConfigError: another process owns it, or it holds an earlier run and this one is fresh.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        advice = "start this one again, or give it another name=" if fresh else "stop that one first"
        raise ConfigError(f"{run_dir} belongs to a k2rl that is still running; {advice}") from None
    try:
        if fresh and _holds_a_run(run_dir):
            raise ConfigError(
                f"{run_dir} holds an earlier run; go on with it (resume={run_dir}) or choose another folder"
            )
        yield
    finally:
        lock.release()


def _holds_a_run(run_dir: Path) -> bool:
    metrics = run_dir / "metrics.jsonl"
    return (run_dir / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)
