"""Which task is drawn and which episode is played next: by what earlier ones tell."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2rl.config import Config, RolloutConfig
from k2rl.rollouts.curriculum import LEAST, chosen, prioritised, weight
from k2rl.rollouts.episode import Episode
from k2rl.rollouts.groups import Group, attempts, drawn_at
from k2rl.rollouts.history import History, Means
from k2rl.rollouts.order import Queue
from k2rl.types import Segment, Task, Trajectory, Verdict


def task(name: str, kind: str = "add") -> Task:
    return Task(name, "e", kind, "train", 0)


def ended(of: Task, tokens: int, reward: float | None = 1.0) -> Trajectory:
    verdict = Verdict.failed("broken") if reward is None else Verdict.scored(reward)
    segments = [Segment((1,), False), Segment((2,) * tokens, True, (-1.0,) * tokens, 0)]
    return Trajectory("id", "group", of, 1.0, segments, verdict=verdict)


def group(of: Task, begun: bool = False) -> Group:
    found = attempts(of, 0, 2, 0, 1, 1.0)
    episodes = [Episode(attempt) for attempt in found]
    if begun:
        episodes[0].trajectory = ended(of, 1)
    return Group(found[0].group_id, of, episodes)


def test_what_is_known_of_a_task_comes_from_itself_its_kind_or_all() -> None:
    history = History(Config())
    assert history.lengths.expected(task("a"), 7.0) == 7.0
    history.add(ended(task("a"), 10))
    history.add(ended(task("b", "sub"), 100, reward=0.0))
    history.add(ended(task("a"), 999, reward=None))
    assert history.lengths.expected(task("a"), 0) == 10
    assert history.lengths.expected(task("c", "sub"), 0) == 100
    assert history.lengths.expected(task("c", "new"), 0) == pytest.approx(19), "the newest counts a tenth"
    assert history.success.expected(task("c", "sub"), 0.5) == 0


def test_the_longest_comes_first_after_what_was_begun_or_is_late() -> None:
    lengths = Means()
    for name, tokens in (("short", 5), ("long", 50)):
        lengths.add(task(name, name), tokens)
    queue = Queue(lengths, longest_first=True)
    short, long, begun, late = (
        group(task(n, k)) for n, k in (("s", "short"), ("l", "long"), ("b", "short"), ("h", "short"))
    )
    begun.pending[0].trajectory = ended(begun.task, 1)
    for one in (short, long, begun, late):
        queue.push(one)
    queue.hurry([late])
    order = [queue.pop(lambda _: True) for _ in range(5)]
    assert order == [late, begun, long, short, None]

    queue = Queue(lengths, longest_first=False)
    for one in (short, long):
        queue.push(one)
    assert queue.pop(lambda one: one is long) is long, "there is no room for the other"
    assert queue.pop(lambda _: True) is short


def test_siblings_tell_more_than_the_task_s_kind() -> None:
    lengths = Means()
    lengths.add(task("x", "add"), 20)
    told, other = group(task("told")), group(task("other"))
    told.finished["a"] = ended(told.task, 500)
    queue = Queue(lengths, longest_first=True)
    queue.push(other)
    queue.push(told)
    assert queue.pop(lambda _: True) is told


@given(st.text(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_group_s_id_says_when_it_was_drawn(name: str, step: int, index: int) -> None:
    (attempt, *_) = attempts(task(name), index, 2, 0, step, 1.0)
    assert drawn_at(attempt.group_id) == (step, index)


def test_weights_of_prioritised_sampling_and_of_a_curriculum() -> None:
    config = RolloutConfig(sampling="prioritised")
    assert [weight(s, 1, config) for s in (0.0, 0.25, 1.0)] == [1.0, 0.75, LEAST]
    config = RolloutConfig(sampling="curriculum", curriculum_steps=10)
    assert [weight(s, 1, config) for s in (0.0, 0.25, 1.0)] == [LEAST, 0.25, 1.0]
    assert weight(0.25, 6, config) == pytest.approx(0.5)
    assert [weight(s, 11, config) for s in (0.0, 1.0)] == [1.0, LEAST]


def test_tasks_are_drawn_in_proportion_to_their_weights() -> None:
    tasks = [task(name) for name in "abc"]
    counts = Counter(chosen(tasks, [0.6, 0.3, 0.1], 1, seed)[0].id for seed in range(4000))
    assert [counts[name] / 4000 for name in "abc"] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    assert chosen(tasks, [1, 1, 1], 3, 0) == tasks


def test_hard_tasks_are_drawn_more_often_and_draws_depend_on_seed_and_step() -> None:
    async def draw(step: int, number: int) -> list[Task]:
        return [task(f"{step}-{number}-{n}", "hard" if n % 4 == 0 else "easy") for n in range(8)]

    success = Means()
    success.add(task("x", "easy"), 1.0)
    success.add(task("y", "hard"), 0.1)
    config = RolloutConfig(sampling="prioritised", candidates=4)
    choose = prioritised(draw, config, 0, success)
    drawn = asyncio.run(choose(3, 0))  # type: ignore[arg-type]
    assert len(drawn) == len({t.id for t in drawn}) == 8
    assert sum(t.kind == "hard" for t in drawn) >= 6, "of 8 hard ones among 32"
    assert asyncio.run(choose(3, 0)) == drawn  # type: ignore[arg-type]
    assert {t.id for t in asyncio.run(choose(3, 1))}.isdisjoint(t.id for t in drawn)  # type: ignore[arg-type]
    assert prioritised(draw, RolloutConfig(), 0, success) is draw
