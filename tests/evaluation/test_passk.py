"""pass@k against its definition: the share of all draws of k answers that hold a right one."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2rl.evaluation.passk import average_ci95, pass_at_k, pass_at_k_ci95


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_draws_with_a_right_answer(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    draws = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("case", [(1, 2, 1), (1, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_what_cannot_be_is_refused(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*case)


def test_tasks_count_alike_and_too_few_answers_do_not_count() -> None:
    estimate = pass_at_k_ci95({"a": (4, 4), "b": (4, 0), "c": (1, 1)}, 2)
    assert estimate is not None
    assert (estimate.mean, estimate.n) == (0.5, 2)
    assert pass_at_k_ci95({"a": (1, 1)}, 2) is None
    average = average_ci95({"a": [1.0, 0.0], "b": [1.0], "c": []})
    assert average is not None
    assert (average.mean, average.n) == (0.75, 2)
    assert average.ci95[0] <= 0.75 <= average.ci95[1]
