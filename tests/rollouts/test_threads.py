"""An executor like the standard library's, except that a stuck job does not outlive its process."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError, wait

import pytest

from k2rl.rollouts.threads import DaemonThreads


def test_results_and_errors_come_back() -> None:
    with DaemonThreads(2, "t") as threads:
        assert list(threads.map(pow, [2, 3, 4], [5, 2, 1])) == [32, 9, 4]
        with pytest.raises(ZeroDivisionError):
            threads.submit(lambda: 1 / 0).result(10)
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(int)


def test_jobs_run_side_by_side_up_to_the_limit() -> None:
    both, release = threading.Barrier(3), threading.Event()
    running = []

    def job(name: str) -> str:
        running.append(name)
        both.wait(10)
        release.wait(10)
        return threading.current_thread().name

    def last() -> str:
        running.append("c")
        return "done"

    threads = DaemonThreads(2, "t")
    first = [threads.submit(job, name) for name in "ab"]
    third = threads.submit(last)
    both.wait(10)
    assert sorted(running) == ["a", "b"]
    release.set()
    assert third.result(10) == "done"
    assert {future.result(10) for future in first} == {"t_0", "t_1"}
    threads.shutdown()


def test_a_thread_that_is_free_is_used_again() -> None:
    with DaemonThreads(8, "t") as threads:
        names = set()
        for _ in range(3):
            names.add(threads.submit(lambda: threading.current_thread().name).result(10))
            # The thread says that it is free just after it has delivered.
            assert threads._idle.acquire(timeout=10)
            threads._idle.release()
    assert names == {"t_0"}


def test_shutdown_cancels_what_waits_and_leaves_what_is_stuck() -> None:
    threads, release = DaemonThreads(1, "t"), threading.Event()
    started = threading.Event()
    stuck = threads.submit(lambda: (started.set(), release.wait(10)))
    waiting = threads.submit(int)
    assert started.wait(10)
    threads.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(0)
    release.set()
    wait([stuck], 10)
    assert stuck.done()


def test_a_stuck_job_does_not_hold_up_the_end_of_the_process() -> None:
    code = (
        "import threading; from k2rl.rollouts.threads import DaemonThreads; started = threading.Event()\n"
        "threads = DaemonThreads(1, 't')\n"
        "threads.submit(lambda: (started.set(), threading.Event().wait()))\n"
        "assert started.wait(10)\n"
        "threads.shutdown(wait=False, cancel_futures=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0
