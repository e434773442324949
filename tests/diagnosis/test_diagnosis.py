"""What is said of processes that stand still: real ones, which nobody helps to answer."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from k2rl.cli import main
from k2rl.diagnosis import activity, hang, stacks
from k2rl.diagnosis.activity import Entry, Part
from k2rl.diagnosis.hang import describe, diagnose, ranked
from k2rl.diagnosis.processes import RunProcess, in_a_word
from k2rl.workers import diagnosis
from k2rl.workers.spec import Site
from tests.conftest import ROOT

Stuck = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "logs"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def stuck(logs: Path) -> Iterator[Stuck]:
    """Start a process of a run and wait until it stands still; see `stuck.py`."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "tests.diagnosis.stuck", str(logs), how]
        started.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "stuck\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_blocked_trainer_is_named_with_its_phase_and_its_function(stuck: Stuck, logs: Path) -> None:
    process = stuck("train")
    found = diagnose(logs)
    assert found.suspects == (process.pid,)
    line, where, *frames = found.essence.splitlines()
    assert f"worker 7 (process {process.pid}): sleeping" in line
    assert "trainer: forward and backward of micro-batch 1 of 1 for " in line
    assert where == f"innermost frames of worker 7 (process {process.pid}, thread trainer_0):"
    assert frames[0].endswith("in stand_still")
    assert any("k2rl/training/passes.py" in frame and "policy_backward" in frame for frame in frames)
    assert "in train" in found.whole
    assert "MainThread" in found.whole


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("py_spy", [True, False])
def test_stacks_with_and_without_py_spy(
    stuck: Stuck, logs: Path, stopped: bool, py_spy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a process must still take signals; of one that was stopped only that is known."""
    process = stuck("sleep")
    if stopped:
        stop(process)
    if not py_spy:
        monkeypatch.setattr(stacks, "_by_py_spy", lambda pid: ([], "py-spy: Operation not permitted"))
    found = diagnose(logs, about=process.pid)
    assert "trainer: policy step: optimizer for " in found.essence
    assert 'last: "all was well"' in found.essence
    assert ("STOPPED" in found.essence) == stopped == ("is stopped" in in_a_word(process.pid))
    if py_spy or not stopped:
        assert re.search(r"stuck\.py:\d+ in stand_still\n", found.essence)
        assert re.search(r"stuck\.py:\d+ in <module>", found.whole)
    else:
        assert "shows no stack: py-spy: Operation not permitted" in found.essence
    if stopped:
        os.kill(process.pid, signal.SIGCONT)
    assert process.poll() is None


def test_the_command_for_a_live_run(stuck: Stuck, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = stuck("sleep")
    assert main(["stacks", str(logs.parent)]) == 0
    essence = capsys.readouterr().out
    assert f"worker 7 (process {process.pid})" in essence
    assert main(["stacks", "--all", str(logs.parent)]) == 0
    assert "thread MainThread" in capsys.readouterr().out
    process.kill()
    process.wait()
    for folder, said in ((logs.parent, "no process of"), (logs, "is not the folder of a run")):
        assert main(["stacks", str(folder)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_phases_nest_and_what_a_part_does_the_longest_counts(logs: Path) -> None:
    part = Part("part")
    activity.begin(logs, "driver")

    def shown() -> Entry | None:
        known = activity.read(os.getpid())
        assert known is not None
        assert known[0].name == "driver"
        return next((entry for entry in known[1] if entry.part == "part"), None)

    assert shown() is None
    with part.doing("generating"):
        first = shown()
        with part.doing("generating"):
            assert shown() == first
        with part.doing('a "quoted" ünïcode\\path ' + "x" * 1000):
            inner = shown()
            assert inner is not None
            assert first is not None
            assert inner.since >= first.since
            assert inner.phase.startswith("generating: a 'quoted' ?n?code/path xxx")
    assert shown() is None
    pid = os.fork()
    if not pid:
        os._exit(activity.read(os.getpid()) is not None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert activity.read(1 << 22) is None


def process(
    pid: int, phase: str = "", since: float = 0.0, state: str = "sleeping", above: int = 1
) -> RunProcess:
    entries = (Entry("part", phase, since, "", 1),) if phase else ()
    return RunProcess(pid, f"process {pid}", state, tuple(range(above)), entries)


def test_who_is_to_blame() -> None:
    stopped, device = process(9, state=psutil.STATUS_STOPPED), process(8, state=psutil.STATUS_DISK_SLEEP)
    long, short = process(7, "training", since=1.0), process(6, "training", since=2.0)
    waiting, nearer = process(5, "waiting for vLLM", above=3), process(4, "waiting for vLLM", above=2)
    silent = process(3)
    everyone = [stopped, device, long, short, waiting, nearer, silent]
    assert ranked(everyone[::-1]) == everyone
    below = RunProcess(2, "below", "sleeping", (3, 0), ())
    assert ranked([*everyone, below], about=3) == [silent, below]


def test_a_process_without_a_phase_has_its_line() -> None:
    assert describe(process(3, state="running"), 5.0) == ["  process 3 (process 3): running"]
    assert describe(process(3, "training", 1.0), 5.0) == [
        "  process 3 (process 3): sleeping; part: training for 4.0 s"
    ]


def test_a_diagnosis_never_hides_the_first_error(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> hang.Diagnosis:
        raise PermissionError("no /proc here")

    def asked() -> str:
        return asyncio.run(diagnosis.Diagnostician(logs)("training", None))

    monkeypatch.setattr(diagnosis, "diagnose", broken)
    assert asked().endswith("could not be found out: PermissionError: no /proc here")
    for_ever = threading.Event()
    monkeypatch.setattr(diagnosis, "diagnose", lambda *_: for_ever.wait())
    monkeypatch.setattr(diagnosis, "DEADLINE_S", 0.1)
    assert "MissedDeadlineError" in asked()
    for_ever.set()


@pytest.mark.integration
def test_another_node_is_looked_at_by_a_task_there(
    stuck: Stuck, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = stuck("sleep")
    with ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False):
        site = Site(ray.get_runtime_context().get_node_id(), "", process.pid, (), (), "")
        elsewhere = SimpleNamespace(get_node_id=lambda: "another")
        monkeypatch.setattr(ray, "get_runtime_context", lambda: elsewhere)
        text = asyncio.run(diagnosis.Diagnostician(logs)("training", site))
    assert f"worker 7 (process {process.pid}): sleeping; trainer: policy step: optimizer for " in text
    assert "in stand_still" in text
    (dump,) = logs.glob("hang-training-*.txt")
    assert "MainThread" in dump.read_text()


def test_several_that_are_late_share_one_diagnosis(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []

    def look(*arguments: object) -> hang.Diagnosis:
        looked.append(arguments)
        return hang.Diagnosis("  worker 0: sleeping", "all of it\n", 1, (5,))

    async def asked() -> list[str]:
        late = diagnosis.Diagnostician(logs)
        return list(await asyncio.gather(*(late(f"generating {i}", None) for i in range(8))))

    monkeypatch.setattr(diagnosis, "diagnose", look)
    (text,) = set(asyncio.run(asked()))
    assert len(looked) == 1
    (dump,) = logs.glob("hang-generating-0-*.txt")
    assert dump.read_text() == "all of it\n"
    assert text == f"\nwhat each part was doing (all Python stacks: {dump}):\n  worker 0: sleeping"


def test_a_full_disk_ends_nothing_that_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(activity._process, "file", full)
    try:
        with activity.TRAINER.doing("a step"):
            pass
    finally:
        os.close(full)
