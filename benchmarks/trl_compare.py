"""Samples per second of a whole GRPO step, k2rl beside TRL, taking turns on this machine's CPU.

Both train SmolLM2-135M-Instruct on the same prompts in the same order: 8 prompts, 8 completions of each, at
most 48 tokens, temperature 1, the same reward, one AdamW update over all 64. A step is everything between one
set of weights that can generate and the next: generate, score, forward, backward, update, and (ours) publish
the weights to vLLM. The learning rate is so small that both policies, and so the lengths of their answers,
stay alike.

TRL gets its own environment (`trl-requirements.txt`: same torch, same transformers) and its better settings
on a CPU: weights and compute in the dtype that this processor is fast at (as ours), all 64 generated as one
batch and trained on 16 at a time, the default key-value cache (the static one is no faster), no gradient
checkpointing, no KL, no logging.

In each round k2rl takes two steps: one that trains on every group, as TRL does, and one in its default
setting, which leaves out groups whose rewards are all equal: their advantages are zero. How many those are
depends on the task; the share of groups trained on is printed.

One side computes at a time: each is a process that waits for a line before every step. What the waiting
side's processes burn meanwhile is measured and printed too.

    make bench-trl                     five rounds
    make bench-trl ARGS="--rounds 9 --trl-micro-batch 64"

Writes outputs/benchmarks/trl_compare-*/result.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import psutil
import trl_task
from filelock import FileLock

from k2rl.hardware import fast_dtype
from k2rl.models.hub import cache_home, resolve_model

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "trl-requirements.txt"
INSTALL_DEADLINE_S = 1800.0
START_DEADLINE_S = 600.0
STEP_DEADLINE_S = 900.0
STOP_DEADLINE_S = 60.0
# The three kinds of steps.
EVERY_GROUP, DEFAULT, TRL = "k2rl, every group", "k2rl, default", "TRL"


@dataclass
class Step:
    """One step of one side."""

    seconds: float
    samples: int
    tokens: int
    #: CPU seconds that the other side's processes used meanwhile.
    other_cpu_s: float
    #: Share of the groups that were trained on, where the side counts them.
    groups_trained: float | None = None

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds


class Side:
    """A worker process that does one training step for each line it gets."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        # Nothing of this process's environment may limit one side only.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )
        self._read("starting", START_DEADLINE_S)

    def step(self, other: Side | None = None, command: str = trl_task.EVERY_GROUP) -> Step:
        assert self._process.stdin is not None
        before = other.cpu_seconds() if other else 0.0
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        record = self._read("a step", STEP_DEADLINE_S)
        after = other.cpu_seconds() if other else 0.0
        samples, tokens = int(record["samples"]), round(record["tokens"])
        return Step(record["seconds"], samples, tokens, after - before, record.get("groups_trained"))

    def cpu_seconds(self) -> float:
        """CPU seconds used so far by the living processes of this side."""
        total = 0.0
        for process in self._tree():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def _tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _read(self, what: str, deadline_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        # Never more than one line is under way, so none can hide in the buffer.
        ready, _, _ = select.select([stdout], [], [], deadline_s)
        line = stdout.readline() if ready else ""
        if not line:
            why = "ended" if ready else f"took more than {deadline_s:.0f} s"
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.name}: {what} {why}; last lines of {self._log}:\n{tail}")
        record: dict[str, Any] = json.loads(line)
        return record

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = self._tree()
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_DEADLINE_S if error is None else 5.0)
        for process in processes:
            if process.is_running():
                process.kill()
        self._process.wait()


def trl_python() -> Path:
    """The interpreter of TRL's environment, which is built at the first call."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = cache_home() / "benchmarks" / f"trl-{digest}"
    python, stamp = folder / "bin" / "python", folder / "installed"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=INSTALL_DEADLINE_S):
        if not stamp.exists():
            print(f"installing TRL into {folder} (1.4 GB, once)", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "install", "-qq", "-r", str(REQUIREMENTS)]
            subprocess.run(pip, check=True, timeout=INSTALL_DEADLINE_S)
            stamp.touch()
    return python


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "k2rl": commit.stdout.strip(),
    }


def compare(rounds: int, dtype: str, trl_micro_batch: int, folder: Path) -> dict[str, list[Step]]:
    """Warm each side up with one step, then let them take turns."""
    model = str(resolve_model("smollm2-135m"))
    theirs_command = [str(trl_python()), str(HERE / "trl_worker.py"), model, dtype, str(trl_micro_batch)]
    ours_command = [sys.executable, str(HERE / "k2rl_worker.py"), model, dtype]
    steps: dict[str, list[Step]] = {EVERY_GROUP: [], DEFAULT: [], TRL: []}
    with (
        Side("trl", theirs_command, folder / "trl.log") as theirs,
        Side("k2rl", ours_command, folder / "k2rl.log") as ours,
    ):
        for side in (theirs, ours):
            print(f"{side.name}: warm-up step {side.step().seconds:.1f} s", flush=True)
        for number in range(1, rounds + 1):
            steps[EVERY_GROUP].append(ours.step(theirs))
            steps[DEFAULT].append(ours.step(theirs, trl_task.DROP_UNIFORM))
            steps[TRL].append(theirs.step(ours))
            print(f"round {number}: " + " | ".join(described(name, side[-1]) for name, side in steps.items()))
            print(
                f"  ratio to TRL: {ratio(steps, EVERY_GROUP)[-1]:.2f}, {ratio(steps, DEFAULT)[-1]:.2f}",
                flush=True,
            )
    return steps


def described(name: str, step: Step) -> str:
    """One step for a person."""
    text = f"{name} {step.seconds:.1f} s, {step.samples_per_s:.2f} samples/s, {step.tokens} tokens"
    if step.groups_trained is not None:
        text += f", {step.groups_trained:.0%} of groups trained on"
    return text


def ratio(steps: dict[str, list[Step]], name: str) -> list[float]:
    """Samples per second relative to TRL's, a round each."""
    pairs = zip(steps[name], steps[TRL], strict=True)
    return [ours.samples_per_s / theirs.samples_per_s for ours, theirs in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=fast_dtype(gpu=False), choices=("bfloat16", "float32"))
    parser.add_argument("--trl-micro-batch", type=int, default=16, help="completions TRL trains on at a time")
    args = parser.parse_args()
    folder = Path("outputs/benchmarks") / f"trl_compare-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder.mkdir(parents=True)
    started = time.monotonic()
    steps = compare(args.rounds, args.dtype, args.trl_micro_batch, folder)
    ratios = {name: ratio(steps, name) for name in (EVERY_GROUP, DEFAULT)}
    result = {
        "machine": machine(),
        "dtype": args.dtype,
        "trl_micro_batch": args.trl_micro_batch,
        "requirements": REQUIREMENTS.read_text().splitlines()[1:],
        "samples_per_s": {name: median(s.samples_per_s for s in side) for name, side in steps.items()},
        "ratio": {
            name: {"median": median(each), "min": min(each), "max": max(each)}
            for name, each in ratios.items()
        },
        "steps": {name: [asdict(step) for step in side] for name, side in steps.items()},
        "seconds": time.monotonic() - started,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    report(result, steps, folder)


def report(result: dict[str, Any], steps: dict[str, list[Step]], folder: Path) -> None:
    """The numbers for a person."""
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for name, side in steps.items():
        seconds = sum(step.seconds for step in side)
        lengths = sum(step.tokens for step in side) / sum(step.samples for step in side)
        idle = sum(step.other_cpu_s for step in side) / seconds
        print(
            f"{name:17} median {result['samples_per_s'][name]:.2f} samples/s, {lengths:.1f} tokens a sample; "
            f"the other side used {idle:.2f} cores meanwhile"
        )
    for name, each in result["ratio"].items():
        print(f"{name} / TRL: median {each['median']:.2f}, min {each['min']:.2f}, max {each['max']:.2f}")
    print(f"written to {folder / 'result.json'}")


if __name__ == "__main__":
    main()
