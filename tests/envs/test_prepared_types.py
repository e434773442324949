"""What is decoded in threads is known to msgspec before: two first uses at once end the process."""

from __future__ import annotations

import subprocess
import sys

UNPREPARED = """
import gc, importlib, pkgutil
import msgspec
import envs, rubrics, sandboxes

for package in (envs, rubrics, sandboxes):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)

def below(kind):
    for child in kind.__subclasses__():
        yield child
        yield from below(child)

for kind in below(msgspec.Struct):
    known = any(type(part).__name__ == "StructInfo" for part in gc.get_referents(kind))
    if not known and kind.__module__.split(".")[0] in ("envs", "rubrics", "sandboxes", "k2rl"):
        print(kind.__name__)
"""

#: Made by us and decoded by nobody.
NEVER_DECODED = {
    *("_End", "Call", "Turn", "_Failed", "Answered", "Reply", "Prompt", "_Asked", "Outcome", "Report"),
    *("Part", "Attempt", "Usage", "Instruction", "_Count", "Claim", "Finding", "ScriptedUser", "_Drawn"),
}

RACE = """
import sys, threading
import msgspec
from k2rl.types import prepare
sys.setswitchinterval(1e-6)

def work(kind, barrier):
    barrier.wait()
    msgspec.convert({"x": {"a": 1}, "y": [{"a": 2}]}, kind)

for _ in range(300):
    inner = msgspec.defstruct("Inner", [("a", int), ("b", list[str] | None, None)])
    kind = msgspec.defstruct("Outer", [("x", inner), ("y", tuple[inner, ...], ()), ("z", str | None, None)])
    prepare(kind)
    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=work, args=(kind, barrier)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )


def test_all_that_is_decoded_is_prepared() -> None:
    done = run(UNPREPARED)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= NEVER_DECODED


def test_a_prepared_type_is_decoded_by_many_threads_at_once() -> None:
    assert run(RACE).returncode == 0
