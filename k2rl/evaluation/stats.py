"""Means with 95 % intervals, and what two of them say about a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal."""

Interval = tuple[float, float]


class Estimate(msgspec.Struct, frozen=True):
    """The mean of `n` values and its 95 % interval; `low <= mean <= high`."""

    mean: float
    ci95: Interval
    n: int


def mean_ci95(values: Sequence[float], seed: int = 0) -> Estimate | None:
    """The mean of `values` with a 95 % interval; None without values.

    Values that are all 0 or 1 get Wilson's score interval, which stays honest near 0 and 1 and for
    few values. Others get a percentile bootstrap, which `seed` makes repeatable; it knows only the
    values it saw, so it has no width when they are all equal.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    if not values:
        return None
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"cannot average {value}")
    mean = _mean(values)
    if all(value in (0, 1) for value in values):
        interval = wilson_interval(round(math.fsum(values)), len(values))
    else:
        interval = bootstrap_interval(values, seed)
    return Estimate(mean, interval, len(values))


def wilson_interval(successes: int, n: int) -> Interval:
    """Wilson's 95 % score interval for a share of `successes` in `n` trials; lies in [0, 1].

    Raises:
        ValueError: unless `0 <= successes <= n` and `n >= 1`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    share = successes / n
    scale = 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / scale
    # Rounding may push the ends past the share at 0 and 1, where they touch it exactly.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> Interval:
    """The 95 % percentile-bootstrap interval of the mean of `values` (at least one).

    It lies between the smallest and the largest value and contains their mean.
    """
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # One resample at a time keeps memory at O(n); an evaluation may have many thousand episodes.
    means = [sample[rng.integers(0, sample.size, sample.size)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    # Rounding may leave the mean of nearly equal values an ulp outside.
    mean = _mean(values)
    return min(max(float(low), min(values)), mean), max(min(float(high), max(values)), mean)


def _mean(values: Sequence[float]) -> float:
    """The mean, never an ulp outside the values as division may leave it."""
    return min(max(math.fsum(values) / len(values), min(values)), max(values))


def difference_ci95(before: Estimate, after: Estimate) -> Estimate:
    """`after - before` with a 95 % interval, from the two intervals alone (MOVER; Newcombe's method 10).

    It treats the two as independent. Both evaluations use the same held-out tasks, so their errors
    tend to agree and the true interval is rather narrower. `n` is the smaller of the two.
    """
    gain = after.mean - before.mean
    low = gain - math.hypot(after.mean - after.ci95[0], before.ci95[1] - before.mean)
    high = gain + math.hypot(after.ci95[1] - after.mean, before.mean - before.ci95[0])
    return Estimate(gain, (low, high), min(before.n, after.n))
