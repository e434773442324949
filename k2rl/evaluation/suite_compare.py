"""Two evaluations of one suite, task by task: how much better one is, and whether that is more than luck."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from k2rl.errors import ConfigError
from k2rl.evaluation.stats import Estimate, mean_ci95
from k2rl.evaluation.suite_episodes import EpisodeRecord
from k2rl.evaluation.suite_results import SuiteResults, load


@dataclass(frozen=True)
class Comparison:
    """`second` minus `first` over the tasks that both have a score for."""

    first: SuiteResults
    second: SuiteResults
    difference: Estimate
    #: Tasks by what became of them.
    better: tuple[str, ...]
    worse: tuple[str, ...]
    same: int
    #: Tasks that only one of them has a score for.
    left_out: int
    #: Two-sided sign test of better against worse: the chance of a split as uneven, were both as good.
    p_value: float
    #: tag -> mean of both and number of tasks.
    per_tag: dict[str, tuple[float, float, int]]


def compare(first: Path, second: Path) -> Comparison:
    """Compare two folders of results.

    Raises:
        ConfigError: one is none, or they are not of the same suite.
    """
    one, one_records = load(first)
    two, two_records = load(second)
    if one.suite != two.suite:
        raise ConfigError(f"{first} is of suite {one.suite}, {second} of {two.suite}: nothing to compare")
    before, after = _by_task(one_records), _by_task(two_records)
    shared = [task for task in before if task in after]
    if not shared:
        raise ConfigError(f"{first} and {second} have no task with a score in common")
    gains = {task: after[task] - before[task] for task in shared}
    difference = mean_ci95(list(gains.values()))
    assert difference is not None
    better = tuple(task for task, gain in gains.items() if gain > 0)
    worse = tuple(task for task, gain in gains.items() if gain < 0)
    tasks_of: defaultdict[str, list[str]] = defaultdict(list)
    for record in {record.task: record for record in one_records if record.task in gains}.values():
        for tag in dict.fromkeys(record.tags):
            tasks_of[tag].append(record.task)
    return Comparison(
        one,
        two,
        difference,
        better,
        worse,
        same=len(shared) - len(better) - len(worse),
        left_out=len({*before, *after}) - len(shared),
        p_value=sign_test(len(better), len(worse)),
        per_tag={
            tag: (_mean([before[task] for task in tasks]), _mean([after[task] for task in tasks]), len(tasks))
            for tag, tasks in sorted(tasks_of.items(), key=lambda item: (-len(item[1]), item[0]))
        },
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided p-value of a fair coin for a split at least as uneven."""
    n, most = better + worse, max(better, worse)
    return min(1.0, 2 * sum(comb(n, i) for i in range(most, n + 1)) / 2**n) if n else 1.0


def as_text(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    low, high = comparison.difference.ci95
    reading = "more than the noise" if low > 0 or high < 0 else "may be noise"
    lines = [
        f"{comparison.first.suite}: {comparison.first.model} -> {comparison.second.model}",
        f"difference {comparison.difference.mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f}), "
        f"n={comparison.difference.n} tasks: {reading}",
        f"better on {len(comparison.better)}, worse on {len(comparison.worse)}, same on {comparison.same}; "
        f"sign test p={comparison.p_value:.3g}"
        + (f"; {comparison.left_out} tasks with a score in only one" if comparison.left_out else ""),
    ]
    for noun, tasks in (("better", comparison.better), ("worse", comparison.worse)):
        if tasks:
            more = f" and {len(tasks) - 10} more" if len(tasks) > 10 else ""
            lines.append(f"  {noun}: {', '.join(tasks[:10])}{more}")
    if comparison.first.digest != comparison.second.digest:
        lines.append("  the two had different tasks; only those with the same names are compared")
    lines.append(f"  {'tag':<24} {'first':>7} {'second':>7} {'tasks':>6}")
    lines += [
        f"  {tag:<24} {one:>7.3f} {two:>7.3f} {n:>6}" for tag, (one, two, n) in comparison.per_tag.items()
    ]
    return "\n".join(lines)


def _by_task(records: Sequence[EpisodeRecord]) -> dict[str, float]:
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.reward is not None:
            rewards[record.task].append(record.reward)
    return {task: _mean(values) for task, values in rewards.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
