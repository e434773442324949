import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2rl.evaluation.stats import (
    Estimate,
    bootstrap_interval,
    difference_ci95,
    mean_ci95,
    wilson_interval,
)

repeatable = settings(derandomize=True, deadline=None, max_examples=25)
rewards = st.lists(st.floats(-10, 10), min_size=1, max_size=40)


# Newcombe (1998), Statistics in Medicine 17:857, table I, method 3 (score, no continuity correction).
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


@repeatable
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_contains_the_share_within_0_and_1(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert low < high


@repeatable
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(2, 9))
def test_wilson_interval_shrinks_with_n(case: tuple[int, int], times: int) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    more_low, more_high = wilson_interval(successes * times, n * times)
    assert more_high - more_low < high - low


def test_wilson_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    rng = random.Random(0)
    truth, n, trials = 0.3, 60, 2000
    covered = 0
    for _ in range(trials):
        low, high = wilson_interval(sum(rng.random() < truth for _ in range(n)), n)
        covered += low <= truth <= high
    assert 0.93 < covered / trials < 0.97


@repeatable
@given(rewards)
def test_bootstrap_interval_contains_the_mean_within_the_values(values: list[float]) -> None:
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) <= low <= high <= max(values)
    mean = statistics.fmean(values)
    assert low <= mean or low == pytest.approx(mean)
    assert mean <= high or high == pytest.approx(mean)


@repeatable
@given(rewards)
def test_an_estimate_is_ordered(values: list[float]) -> None:
    estimate = mean_ci95(values)
    assert estimate is not None
    assert estimate.ci95[0] <= estimate.mean <= estimate.ci95[1]


def test_bootstrap_interval_agrees_with_the_normal_one_and_shrinks_with_n() -> None:
    rng = random.Random(1)
    values = [rng.gauss(2.0, 1.0) for _ in range(400)]
    few, many = bootstrap_interval(values[:25]), bootstrap_interval(values)
    assert many[1] - many[0] == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])


def test_bootstrap_interval_is_fixed_by_its_seed() -> None:
    values = [math.sqrt(n) for n in range(30)]
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_mean_ci95_takes_wilson_for_zeros_and_ones_and_the_bootstrap_otherwise() -> None:
    assert mean_ci95([0.0, 1.0, 1.0, 0.0]) == Estimate(0.5, wilson_interval(2, 4), 4)
    mixed = [0.0, 1.0, 0.5]
    assert mean_ci95(mixed) == Estimate(0.5, bootstrap_interval(mixed), 3)


def test_mean_ci95_of_nothing_is_none_and_of_nan_an_error() -> None:
    assert mean_ci95([]) is None
    with pytest.raises(ValueError, match="nan"):
        mean_ci95([1.0, math.nan])


def test_difference_of_two_shares_has_newcombes_known_interval() -> None:
    # Newcombe (1998), Statistics in Medicine 17:873, table II (a), method 10: 56/70 against 48/80.
    before, after = mean_ci95([1.0] * 48 + [0.0] * 32), mean_ci95([1.0] * 56 + [0.0] * 14)
    assert before is not None
    assert after is not None
    gain = difference_ci95(before, after)
    assert gain.mean == pytest.approx(0.2)
    assert gain.ci95 == pytest.approx((0.0524, 0.3339), abs=5e-5)
