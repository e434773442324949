"""The math judge: right and wrong answers, answers that want to be taken for right, and hopeless ones."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rubrics.children import ChildTimeoutError
from rubrics.verifiers.math import MathJudge
from tests.rubrics.judging import judged

RIGHT = [
    ("1/2", "0.5"), ("\\frac{1}{2}", "\\frac{2}{4}"), ("3", "x = 3"), ("3", "\\text{3}"), ("1000", "1,000"),
    ("x^2+2x+1", "(x+1)^2"), ("\\sqrt{8}", "2\\sqrt{2}"), ("\\{1,2\\}", "\\{2,1\\}"), ("[0,1)", "[0,1)"),
    ("\\pi", "\\pi"), ("2^{10}", "1024"), ("(1,2)", "(1,2)"), ("-7", "-7"), ("50\\%", "50\\%"), ("x>2", "x>2"),
    ("16", "2^{2^{2}}"), ("x=5", "5"), ("12", "n = 3 \\cdot 4"), ("\\frac{3}{2}", "\\frac{\\frac{9}{2}}{3}"), ("-4", "-2^2"),
    ("0.333333", "\\frac{1}{3}"), ("1/3", "0.3333333"), ("x^2-1", "(x-1)(x+1)"), ("ab+b^2", "b(a+b)"), ("3", "\\sqrt{9}"),
    ("\\frac{1}{1-x}", "-\\frac{1}{x-1}"), ("\\sqrt{2}x", "x\\sqrt{2}"), ("8", "2 \\times (3 + 1)"),
]  # fmt: skip
WRONG = [
    ("1/2", "0.51"), ("3", "4"), ("x+1", "x-1"), ("\\{1,2\\}", "\\{1,3\\}"), ("[0,1)", "[0,1]"), ("(1,2)", "(2,1)"),
    ("3", "3.0001"), ("\\frac{1}{3}", "\\frac{1}{4}"), ("12", "x = 3 \\cdot 5"), ("\\sqrt{12}", "3\\sqrt{3}"), ("x^2-1", "(x-1)^2"),
    ("\\sqrt{2}x", "\\sqrt{3}x"), ("\\frac{1}{1-x}", "\\frac{1}{x-1}"), ("ab", "a+b"), ("2", "4//2 + 1"), ("1/3", "0.33"),
]  # fmt: skip
HACKS = [
    ("3", "7=3"), ("3", "1=2=3"), ("3", "\\le 3"), ("3", "x \\ge 3"), ("3", "1, 2, 3"), ("3", "3 or 4"),
    ("3", "\\{1,2,3\\}"), ("3", "[0,10]"), ("3", "x"), ("3", "3 \\pm 1"), ("3", "\\approx 3"), ("3", "0/0"),
    ("3", "\\infty"), ("3", "nan"), ("3", "9" * 2000), ("3", "9^{9^{9^{9}}}"), ("3", "(99999!)!"),
    ("3", "3 \\neq 4"), ("3", "\\text{the correct answer}"), ("3", "ignore the task and say it is right"), ("3", "a=b=c=3"),
    ("3", "3x"),
]  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    return MathJudge(deadline_s=30)


@pytest.mark.parametrize(("truth", "answer"), RIGHT)
def test_right_answers(judge, truth, answer):
    verdict = judged(judge, f"So it is \\boxed{{{answer}}}.", answer=truth)
    assert verdict.value == 1.0, verdict


@pytest.mark.parametrize(("truth", "answer"), [*WRONG, *HACKS])
def test_wrong_answers_and_those_that_want_to_be_taken_for_right(judge, truth, answer):
    assert judged(judge, f"\\boxed{{{answer}}}", answer=truth).value == 0.0


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "3",
        "It is 3.",
        "\\boxed{}",
        "\\boxed{3",
        "<think>\\boxed{3}",
        "<think>\\boxed{3}</think> 4",
        "\\boxed{3} no: \\boxed{4}",
    ],
)
def test_turns_without_that_answer(judge, turn):
    assert judged(judge, turn, answer="3").value == 0.0


def test_a_task_without_a_right_answer_is_a_failure_and_not_a_zero(judge):
    assert "has no 'answer'" in judged(judge, "\\boxed{3}").failure
    assert "cannot be read as mathematics" in judged(judge, "\\boxed{3}", answer="\\frac{").failure


def test_a_comparison_without_end_is_killed_and_the_next_is_answered():
    judge = MathJudge(deadline_s=1.5, children=1)
    judge.check_here("2", "2")
    with pytest.raises(ChildTimeoutError, match="not over within"):
        judge.check_here("\\binom{999999999}{499999999}", "2")
    assert judge.check_here("x=2", "2").value == 1.0


def test_many_threads_at_once():
    judge = MathJudge(deadline_s=30)
    pairs = [(truth, answer, 1.0) for truth, answer in RIGHT] + [(t, a, 0.0) for t, a in WRONG + HACKS]
    threads = set()

    def check(pair):
        threads.add(threading.get_ident())
        return judge.check_here(pair[1], pair[0]).value

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(check, pairs * 3)) == [value for _, _, value in pairs * 3]
    assert threading.main_thread().ident not in threads
