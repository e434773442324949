"""The guests of the benchmarks: whose judge is off, and when."""

from __future__ import annotations

from itertools import islice

from benchmarks.guests_env import Guests
from k2rl.types import Task


def rewards(env: Guests, task: Task, count: int = 64) -> list[float]:
    found = []
    for _ in range(count):
        env.reset(seed=task.seed, options={"task": task})
        found.append(env.step("well thanks")[1])
    return found


def test_jitter_is_in_training_alone_and_no_larger_than_asked_for() -> None:
    env = Guests("chatty", jitter=0.01)
    (train,), (held_out,) = (list(islice(env.tasks(split, 0), 1)) for split in ("train", "eval"))
    assert set(rewards(env, held_out)) == {1.0}
    found = rewards(env, train)
    assert len(set(found)) == 64
    assert 0.005 < max(found) - 1.0 <= 0.01
    assert 0.005 < 1.0 - min(found) <= 0.01


def test_without_jitter_a_judge_says_the_same_again() -> None:
    env = Guests("chatty")
    assert set(rewards(env, next(env.tasks("train", 0)))) == {1.0}
