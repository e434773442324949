"""Judges together: values, failures, deadlines, tries, and what is kept."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from k2rl.errors import ConfigError
from k2rl.types import Evidence, Verdict
from rubrics import registry
from rubrics.base import Rubric, judge_safely
from rubrics.cache import MemoryCache, SqliteCache, content_key
from rubrics.compose import ByTask, FirstFailure, Gate, Minimum, Part, WeightedSum
from rubrics.groups import judge_group_safely
from tests.rubrics.judging import episode, judged


class Says(Rubric):
    """Gives its values in turn; an exception is raised."""

    def __init__(self, *answers, idempotent=False, low=0.0, high=1.0, kept=False):
        self.answers, self.asked = list(answers), 0
        self.idempotent, self.reward_range, self.kept = idempotent, (low, high), kept

    def content(self, trajectory):
        return [trajectory.id] if self.kept else None

    async def judge(self, trajectory):
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        if answer == "hangs":
            await asyncio.sleep(60)
        return Verdict.scored(
            answer, {"part": answer}, evidence=[Evidence("seen", "part", True, (0, 3))], judge="s@1"
        )


def parts(*rubrics, weights=(), **fields):
    weights = weights or [1.0] * len(rubrics)
    return [Part(f"j{i}", r, w, **fields) for i, (r, w) in enumerate(zip(rubrics, weights, strict=True))]


def test_a_weighted_mean_with_its_parts():
    verdict = judged(WeightedSum(parts(Says(0.5), Says(1.0), weights=(3, 1))))
    assert verdict.value == pytest.approx(0.625)
    assert verdict.components == {"j0/part": 0.5, "j1/part": 1, "j0": 0.5, "j1": 1}
    assert verdict.weights == {"j0": 0.75, "j1": 0.25}
    assert [(item.component, item.span) for item in verdict.evidence] == [
        ("j0/part", (0, 3)),
        ("j1/part", (0, 3)),
    ]
    assert verdict.judge == "s@1"


def test_sums_and_ranges():
    both = parts(Says(-1, low=-1), Says(2, high=2), weights=(2, 3))
    assert WeightedSum(both, mean=False).reward_range == (-2, 8)
    assert judged(WeightedSum(both, mean=False)).value == 4
    assert WeightedSum(both).reward_range == pytest.approx((-0.4, 1.6))
    assert Minimum(both).reward_range == (-1, 1)
    assert judged(Minimum(both)).value == -1


def test_a_gate_stops_before_it_costs_anything():
    costly = Says(0.7)
    assert judged(Gate(parts(Says(0.0), costly))).value == 0
    assert costly.asked == 0
    assert judged(Gate(parts(Says(1.0), costly))).value == 0.7
    assert judged(Gate(parts(Says(0.5), Says(0.7, low=-1)), at_least=0.6)).value == -1


def test_the_first_failure():
    last = Says(0.2)
    assert judged(FirstFailure(parts(Says(1.0), Says(0.4), last))).value == 0.4
    assert last.asked == 0
    assert judged(FirstFailure(parts(Says(1.0), Says(1.0), last))).value == 0.2


@pytest.mark.parametrize("kind", [WeightedSum, Minimum, Gate, FirstFailure])
@pytest.mark.parametrize("answer", [ValueError("no"), math.nan, math.inf, 7.0, "hangs"], ids=str)
def test_one_that_fails_fails_the_whole(kind, answer):
    verdict = judged(kind(parts(Says(1.0), Says(answer), deadline_s=0.2)))
    assert verdict.value is None
    assert "judge 'j1': Says on trajectory e" in verdict.failure


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSum([]), "there are no judges"),
        (lambda: WeightedSum(parts(Says(1), Says(1), weights=(0, 0))), "sum to 0"),
        (lambda: WeightedSum({"a": {"id": "math", "wight": 2}}), "unknown field `wight`"),
        (lambda: WeightedSum({"a": {"id": "exact", "weight": math.nan}}), "weight=nan"),
        (lambda: WeightedSum({"a": {"id": "exact", "deadline_s": 0}}), "deadline_s must be above 0"),
        (lambda: Gate(parts(Says(1))), "there are no judges"),
        (lambda: Gate(parts(Says(1), Says(1)), at_least=2), "outside the gate's range"),
        (lambda: ByTask({}), "cases must not be empty"),
        (lambda: ByTask({"a": "exact"}, by="colour"), "must be env or kind"),
    ],
)
def test_what_cannot_be_put_together(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_from_configuration():
    rubric = registry.make(
        "gate", judges={"form": {"id": "format", "kwargs": {"tags": ["answer"]}}, "right": "exact"}
    )
    assert judged(rubric, "<answer>Paris</answer>", answer="paris").value == 1
    assert judged(rubric, "It is <answer>Paris</answer>", answer="paris").value == 0
    with pytest.raises(ConfigError, match="unknown rubric 'exct'"):
        registry.make("weighted_sum", judges={"a": "exct"})


def test_another_rubric_for_each_environment():
    rubric = ByTask({"test": "exact", "default": {"id": "numeric"}})
    assert judged(rubric, "Answer: 1.0", answer="1").value == 0
    assert "no case for 'default'" in judged(ByTask({"other": "exact"}, by="kind"), "x").failure
    assert judged(ByTask({"default": "numeric"}), "Answer: 1.0", answer="1").value == 1


@pytest.mark.parametrize(("idempotent", "value", "asked"), [(True, 0.5, 3), (False, None, 1)])
def test_only_who_may_be_asked_again_is(idempotent, value, asked):
    flaky = Says(ValueError("1"), ValueError("2"), 0.5, idempotent=idempotent)
    assert judged(WeightedSum(parts(flaky, retries=4))).value == value
    assert flaky.asked == asked


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_verdicts_are_kept_and_failures_are_not(tmp_path, kind):
    cache = MemoryCache() if kind == "memory" else SqliteCache(tmp_path / "deep" / "verdicts.sqlite")
    flaky = Says(ValueError("once"), 0.5, 0.9, kept=True)
    rubric = WeightedSum(parts(flaky), cache=cache)
    assert not judged(rubric).ok
    first, again = judged(rubric), judged(rubric)
    assert first == again
    assert first.value == 0.5
    assert flaky.asked == 2
    if kind == "file":
        other = SqliteCache(tmp_path / "deep" / "verdicts.sqlite")
        assert other.get(content_key(flaky, episode())).value == 0.5
        threads = [threading.Thread(target=cache.put, args=(str(i), first)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other.get("7") == first


def test_the_memory_is_bounded():
    cache = MemoryCache(most=2)
    for key in "abc":
        cache.put(key, Verdict.scored(1.0))
    assert cache.get("a") is None
    assert cache.get("c").value == 1


class Longest(Rubric):
    """1 for the longest of a group."""

    needs_group = True

    async def judge(self, trajectory):
        raise AssertionError("asked alone")

    async def judge_group(self, trajectories):
        best = max(len(t.messages[-1].content) for t in trajectories)
        return [Verdict.scored(float(len(t.messages[-1].content) == best)) for t in trajectories]


def test_groups_inside_of_sums():
    rubric = WeightedSum(parts(Longest(), Says(0.5), weights=(1, 1)))
    assert rubric.needs_group
    group = [episode("a"), episode("abc")]
    assert [v.value for v in asyncio.run(judge_group_safely(rubric, group, 5))] == [0.25, 0.75]
    both = ByTask({"default": "exact"})
    assert not both.needs_group


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda ts: [Verdict.scored(1.0)], "no list of one verdict"),
        (lambda ts: None, "no list"),
        (lambda ts: [Verdict(value=math.nan), Verdict.scored(1.0)], "nan"),
        (lambda ts: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_group_judges_that_misbehave(answer, reason):
    class Odd(Longest):
        async def judge_group(self, trajectories):
            return answer(trajectories)

    verdicts = asyncio.run(judge_group_safely(Odd(), [episode("a"), episode("b")], 5))
    assert not verdicts[0].ok
    assert reason in verdicts[0].failure


def test_evidence_and_weights_are_looked_at_too():
    class Odd(Rubric):
        def __init__(self, verdict):
            self.verdict = verdict

        async def judge(self, trajectory):
            return self.verdict

    for verdict, reason in [
        (Verdict(1.0, weights={"a": math.inf}), "weight of a is inf"),
        (Verdict(1.0, evidence=("seen",)), "no sequence of Evidence"),
    ]:
        assert reason in asyncio.run(judge_safely(Odd(verdict), episode(), 5)).failure
