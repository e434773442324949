"""`k2rl envs check`: what it finds in environments with faults, and that those that ship have none."""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
import time
from collections.abc import Collection
from itertools import count
from typing import Any, ClassVar

import pytest

import envs
from envs.base import TextEnv
from k2rl import cli
from k2rl.authoring.check import Finding, Settings, check
from k2rl.types import Message, Task

QUICK = Settings(tasks=2, deadline_s=60.0)


class GoodEnv(TextEnv):
    """Say the number."""

    kinds: tuple[str, ...] = ("say",)

    def tasks(self, split: str, seed: int) -> Any:
        for index in count():
            number = random.Random(f"{seed}/{index}").randrange(10**6) * 2 + (split == "eval")
            yield Task(f"say/{split}/{seed}/{index}", "say", "say", split, index, {"number": number})  # type: ignore[arg-type]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.task = self.start_episode(seed, options)
        return (Message("user", f"Say {self.task.data['number']}"),), {}

    def step(self, action: str) -> Any:
        return (), float(action == str(self.task.data["number"])), True, False, {}

    def demonstration(self, task: Task) -> list[str]:
        return [str(task.data["number"])]


class SnapshotEnv(GoodEnv):
    def reset(self, **kwargs: Any) -> Any:
        self.turns = 0
        return super().reset(**kwargs)

    def step(self, action: str) -> Any:
        self.turns += 1
        if self.turns == 3:
            return super().step(action)
        return (Message("user", f"{self.turns}"),), 0.0, False, False, {}

    def demonstration(self, task: Task) -> list[str]:
        return ["wait", "wait", *super().demonstration(task)]

    def snapshot(self) -> bytes:
        return bytes([self.turns])

    def restore(self, task: Task, snapshot: bytes) -> None:
        self.task, self.turns = task, snapshot[0]


class ForgetfulEnv(SnapshotEnv):
    def restore(self, task: Task, snapshot: bytes) -> None:
        self.task, self.turns = task, 0


class BothSplitsEnv(GoodEnv):
    def tasks(self, split: str, seed: int) -> Any:
        for task in super().tasks(split, seed):
            yield Task(task.id, "say", "say", split, task.seed, {"number": task.data["number"] % 7})  # type: ignore[arg-type]


class MoodyTasksEnv(GoodEnv):
    def tasks(self, split: str, seed: int) -> Any:
        return super().tasks(split, random.randrange(10**6))


class HashedTasksEnv(GoodEnv):
    def tasks(self, split: str, seed: int) -> Any:
        return super().tasks(split, hash(f"{seed}"))


class TupleTasksEnv(GoodEnv):
    def tasks(self, split: str, seed: int) -> Any:
        for task in super().tasks(split, seed):
            yield Task(task.id, "say", "say", split, 0, {"number": task.data["number"], "pair": (1, 2)})  # type: ignore[arg-type]


class MoodyEnv(GoodEnv):
    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return (Message("user", f"Say {random.random()}"),), {}


class OutOfRangeEnv(GoodEnv):
    def step(self, action: str) -> Any:
        return (), 1.0 if action.isdigit() else -1.0, True, False, {}


class FreeLunchEnv(GoodEnv):
    def step(self, action: str) -> Any:
        return (), 1.0, True, False, {}


class NotANumberEnv(GoodEnv):
    def step(self, action: str) -> Any:
        return (), float("nan"), True, False, {}


class FourTupleEnv(GoodEnv):
    def step(self, action: str) -> Any:
        return (), 1.0, True, {}


class RaisingEnv(GoodEnv):
    def step(self, action: str) -> Any:
        return (), float(int(action) == self.task.data["number"]), True, False, {}


class HangingEnv(GoodEnv):
    def step(self, action: str) -> Any:
        threading.Event().wait()


class UnsolvedEnv(GoodEnv):
    def demonstration(self, task: Task) -> list[str]:
        return ["never"]


class ThreadEnv(GoodEnv):
    def reset(self, **kwargs: Any) -> Any:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        return super().reset(**kwargs)


class DescriptorEnv(GoodEnv):
    held: ClassVar[list[Any]] = []

    def reset(self, **kwargs: Any) -> Any:
        self.held.append(open("/dev/null"))  # noqa: SIM115, PTH123
        return super().reset(**kwargs)


class ChildEnv(GoodEnv):
    held: ClassVar[list[Any]] = []

    def reset(self, **kwargs: Any) -> Any:
        self.held.append(subprocess.Popen(["sleep", "1000"]))
        return super().reset(**kwargs)


class TaskEnv(GoodEnv):
    held: ClassVar[list[Any]] = []

    async def reset(self, **kwargs: Any) -> Any:
        self.held.append(asyncio.create_task(asyncio.sleep(1000)))
        return super().reset(**kwargs)


def found(
    kind: type[TextEnv], only: Collection[str] | None = None, settings: Settings = QUICK
) -> dict[str, Finding]:
    id = f"{kind.__module__}:{kind.__name__}"
    return {finding.about: finding for finding in asyncio.run(check(id, {}, settings, only))}


@pytest.mark.parametrize("kind", [GoodEnv, SnapshotEnv])
def test_no_fault(kind: type[TextEnv]) -> None:
    findings = found(kind)
    assert {finding.status for finding in findings.values()} == {"ok"}, findings
    assert findings["demonstrations"].detail == "earn 1 to 1, of 0 to 1"


@pytest.fixture
def quick_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k2rl.authoring.held.SETTLE_S", 0.2)


@pytest.mark.usefixtures("quick_leaks")
@pytest.mark.parametrize(
    ("kind", "about", "detail"),
    [
        (BothSplitsEnv, "splits", "7 tasks are in both train and eval"),
        (MoodyTasksEnv, "tasks", "gives others the second time"),
        (HashedTasksEnv, "tasks in another process", "draws other tasks for the same seed"),
        (TupleTasksEnv, "tasks", "its data are no JSON values"),
        (MoodyEnv, "equal seeds", "with the same seed and turns differ at reset"),
        (OutOfRangeEnv, "nonsense", "'' earns -1, outside 0 to 1"),
        (NotANumberEnv, "demonstrations", "step's reward is nan, not a finite number"),
        (FourTupleEnv, "demonstrations", "not (messages, reward, terminated, truncated, info)"),
        (RaisingEnv, "nonsense", "raises ValueError: invalid literal for int()"),
        (UnsolvedEnv, "demonstrations", "earns 0, the lowest reward there is"),
        (ForgetfulEnv, "snapshots", "goes on differently from its snapshot"),
        (ThreadEnv, "leaks", "leave behind: 2 threads"),
        (DescriptorEnv, "leaks", "leave behind: 2 file descriptors"),
        (ChildEnv, "leaks", "2 child processes"),
        (TaskEnv, "leaks", "leave behind: 2 asyncio tasks"),
    ],
)
def test_a_fault_is_found(kind: type[TextEnv], about: str, detail: str) -> None:
    try:
        finding = found(kind, [about])[about]
    finally:
        for child in ChildEnv.held:
            child.kill()
            child.wait()
        ChildEnv.held.clear()
    assert finding.status == "FAULT"
    assert detail in finding.detail


@pytest.mark.usefixtures("quick_leaks")
def test_an_environment_that_hangs_is_named() -> None:
    findings = found(HangingEnv, ["nonsense"], Settings(tasks=1, deadline_s=0.5))
    assert findings["nonsense"].status == "FAULT"
    assert "hangs" in findings["nonsense"].detail


def test_a_reward_for_nothing_is_noted() -> None:
    assert found(FreeLunchEnv, ["nonsense"])["nonsense"].status == "note"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs", "check", "calculator", "max_calls=3", "--tasks", "1"]) == 0
    said = capsys.readouterr().out
    assert "ok     splits" in said
    assert said.endswith("calculator: no fault\n")
    assert cli.main(["envs", "check", f"{__name__}:UnsolvedEnv", "--tasks", "1"]) == 1
    assert "FAULT  demonstrations" in capsys.readouterr().out
    assert cli.main(["envs", "check", "calculater"]) == 2
    assert "did you mean 'calculator'" in capsys.readouterr().err
    assert cli.main(["envs", "check", "calculator", "calls"]) == 2
    assert "'calls' is not KEY=VALUE" in capsys.readouterr().err


#: Played by an agent of the user's, or elsewhere (tests/envs/test_service.py): nothing without arguments.
NOT_BY_THEMSELVES = {"agent", "agent_command", "remote"}


@pytest.mark.parametrize("id", sorted(envs.available().keys() - NOT_BY_THEMSELVES))
def test_every_environment_that_ships_passes(id: str) -> None:
    findings = {finding.about: finding for finding in asyncio.run(check(id, {}, QUICK))}
    assert [finding for finding in findings.values() if finding.status == "FAULT"] == []
    # Games of other packages know no ideal episodes.
    expected = "note" if id in ("gymnasium", "textarena") else "ok"
    assert findings["demonstrations"].status == expected
