"""A realistic run, made up: the files a calculator run leaves, without training anything."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from k2rl.config import TrackingConfig
from k2rl.evaluation.results import EvaluationResult, summarise
from k2rl.tracking import phases
from k2rl.tracking.timeline import Timeline
from k2rl.tracking.tracker import Tracker
from k2rl.types import Message, Segment, Task, ToolCall, Trajectory, Verdict

KINDS = ("add", "multiply", "word_problem")
CONFIG = """\
model: {path: smollm2-135m, dtype: bfloat16}
env: {id: calculator, eval_tasks: 120, max_turns: 4}
train: {steps: 15, eval_every: 5}
optimizer: {name: muon, lr: 2.0e-05, betas: [0.9, 0.95]}
name: calculator
seed: 7
"""


class FakeClock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def make_trajectory(
    name: str = "e0", reward: float | None = 1.0, *, kind: str = "add", split: str = "train", task: str = "t0"
) -> Trajectory:
    """One episode of the calculator; `reward=None` is a failed one."""
    number = sum(map(ord, task))
    left, right = 12 + number % 80, 3 + number % 17
    call = ToolCall(
        id="functions.calculator:0", name="calculator", arguments={"expression": f"{left}+{right}"}
    )
    answer = f"The answer is {left + right}." if reward else f"It is about {left} & <b>more</b>."
    return Trajectory(
        id=name,
        group_id=f"g-{task}",
        task=Task(id=task, env="calculator", kind=kind, split=split, seed=number),
        temperature=1.25,
        segments=[
            Segment(tuple(range(40)), sampled=False),
            Segment(tuple(range(18)), sampled=True, logprobs=(-0.5,) * 18, weight_version=3),
            Segment(tuple(range(6)), sampled=False),
            Segment(tuple(range(9)), sampled=True, logprobs=(-0.25,) * 9, weight_version=4),
        ],
        messages=[
            Message("system", "You can call tools. Give the final number alone."),
            Message("user", f"What is {left} plus {right}?"),
            Message("assistant", "I will use the calculator.", tool_calls=(call,)),
            Message("tool", f"{left + right}\n(exact)", tool_call_id=call.id),
            Message("assistant", answer),
        ],
        stop_reason="env_done" if reward is not None else "failed",
        verdict=(
            Verdict.failed("sandbox died: out of memory")
            if reward is None
            else Verdict.scored(reward, {"correct": reward, "format": 1.0})
        ),
        seconds=1.5,
    )


def make_evaluation(name: str, step: int, accuracy: float, seed: int = 0) -> EvaluationResult:
    rng = random.Random(f"{name} {seed}")
    trajectories = []
    for number in range(120):
        kind = KINDS[number % 3]
        chance = accuracy * {"add": 1.3, "multiply": 0.9, "word_problem": 0.6}[kind]
        reward = None if number == 50 and name == "after" else float(rng.random() < chance)
        trajectories.append(
            make_trajectory(f"{name}-{number}", reward, kind=kind, split="eval", task=f"{kind}-{number:03d}")
        )
    return summarise(name, step, trajectories)


def step_metrics(step: int, rng: random.Random) -> dict[str, float]:
    level = 0.18 + 0.5 * (1 - 0.82**step)
    mean = level + rng.gauss(0, 0.03)
    return {
        "reward/mean": mean,
        "reward/kind/add": mean * 1.2,
        "reward/kind/multiply": mean,
        "reward/kind/word_problem": mean * 0.7,
        "rollout/episodes": 96.0,
        "rollout/failed": float(step % 7 == 3) * 2,
        "rollout/tokens_mean": 62 - step * 1.4 + rng.gauss(0, 2),
        "rollout/truncated_share": max(0.0, 0.28 - 0.02 * step + rng.gauss(0, 0.015)),
        "rollout/tokens_per_second": 240 + rng.gauss(0, 12),
        "rollout/episodes_per_second": 3.9 + rng.gauss(0, 0.2),
        "rollout/temperature": 1.3 - 0.4 * (step - 1) / 14,
        "train/loss": 0.02 + rng.gauss(0, 0.004),
        "train/grad_norm": 0.8 + rng.gauss(0, 0.1),
        "ptx/loss": 2.1 - 0.01 * step,
        "ptx/held_out_nll": 2.2 + 0.01 * step,
        "mismatch/mean_abs_gap": 0.0031 + abs(rng.gauss(0, 0.0004)),
        "mismatch/max_abs_gap": 0.09 + abs(rng.gauss(0, 0.03)),
    }


def build_run(run_dir: Path, steps: int = 15, total: int = 15, evaluations: tuple[str, ...] = ()) -> Path:
    """Write a run of `steps` steps through the real `Tracker`, under a clock of its own.

    Args:
        evaluations: of `base`, `before`, `after`; `step_<n>` is added every five steps.
    """
    rng = random.Random(3)
    clock = FakeClock()
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    with Tracker(run_dir, TrackingConfig(live="off"), total) as tracker:
        tracker.timeline.close()
        tracker.timeline = Timeline(run_dir, clock=clock)

        def spend(phase: str, step: int, seconds: float) -> None:
            with tracker.phase(phase, step):
                clock.now += seconds * rng.uniform(0.85, 1.15)
            clock.now += 0.1

        def evaluate(name: str, step: int, accuracy: float) -> None:
            spend(phases.EVALUATE, step, 22)
            tracker.evaluation(make_evaluation(name, step, accuracy, seed=step + len(name)))

        spend(phases.START, 0, 35)
        spend(phases.PUBLISH, 0, 1.6)
        spend(phases.SELF_CHECK, 0, 3)
        if "base" in evaluations:
            evaluate("base", 0, 0.02)
            spend(phases.WARM_START, 0, 48)
            spend(phases.PUBLISH, 0, 1.6)
        if "before" in evaluations:
            evaluate("before", 0, 0.2)
        for step in range(1, steps + 1):
            spend(phases.ROLLOUT, step, 25)
            spend(phases.TRAIN, step, 31)
            spend(phases.PUBLISH, step, 1.6)
            trajectories = [
                make_trajectory(f"s{step}-{n}", float(n % 3 == 0), task=f"t{n}") for n in range(8)
            ]
            tracker.samples(step, trajectories)
            tracker.step(step, step_metrics(step, rng))
            if step == 3:
                tracker.note("2 of 96 episodes failed: sandbox died: out of memory")
            if step % 5 == 0 and step < total:
                spend(phases.CHECKPOINT, step, 4)
            if step % 5 == 0 and step < total and evaluations:
                evaluate(f"step_{step}", step, 0.2 + 0.03 * step)
        if "after" in evaluations:
            spend(phases.CHECKPOINT, steps, 4)
            evaluate("after", steps, 0.68)
            spend(phases.SAVE, steps, 2)
    return run_dir


@pytest.fixture
def trajectory() -> Callable[..., Trajectory]:
    return make_trajectory


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return build_run


@pytest.fixture
def evaluation() -> Callable[..., EvaluationResult]:
    return make_evaluation
