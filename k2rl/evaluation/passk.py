"""pass@k without bias, and means over samples of tasks, with intervals over tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from k2rl.evaluation.stats import Estimate, mean_ci95


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that of `k` answers, drawn without replacement from `n` of which `correct` are, one is.

    1 - C(n - correct, k) / C(n, k), as a product (Chen et al., 2021, section 2.1).

    Raises:
        ValueError: unless `0 <= correct <= n` and `1 <= k <= n`.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} correct answers in {n}")
    if n - correct < k:
        return 1.0
    wrong = 1.0
    for i in range(n - correct + 1, n + 1):
        wrong *= 1.0 - k / i
    return 1.0 - wrong


def pass_at_k_ci95(correct: Mapping[str, tuple[int, int]], k: int) -> Estimate | None:
    """Mean pass@k over tasks, given as task -> (answers, correct ones); None if no task has `k` answers.

    The interval is one over tasks: Wilson's where all are 0 or 1, bootstrapped otherwise.
    """
    return mean_ci95([pass_at_k(n, c, k) for n, c in correct.values() if n >= k])


def average_ci95(rewards: Mapping[str, Sequence[float]]) -> Estimate | None:
    """Avg@k: the mean over tasks of the mean over a task's answers; its interval is one over tasks."""
    return mean_ci95([sum(values) / len(values) for values in rewards.values() if values])
