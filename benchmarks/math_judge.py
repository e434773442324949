"""How fast and how safely the math judge works: 2,000 pairs from worker threads, some hopeless.

Prints pairs a second, the 99th percentile of the time a pair took in its child beside the deadline, and what
came of the hopeless ones. Exits with 1 if an exception other than a missed deadline came out, an answer was
judged wrongly, or it hung.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from rubrics.children import ChildError, ChildTimeoutError
from rubrics.verifiers.math import MathJudge

HOPELESS = [
    "9^{9^{9^{9}}}",
    "(99999!)!",
    "9" * 5000,
    "(2+3)^{(4+5)^{(6+7)}}",
    "\\binom{999999999}{499999999}",
    "\\prod_{k=1}^{9999999} k",
    "{" * 500,
    "\\frac{" * 300 + "1" + "}{2}" * 300,
    "\\int_0^1 x^{x^{x}} dx",
    "((((((((((" * 90,
]


def pairs(count: int, share: float, seed: int) -> list[tuple[str, str, float | None]]:
    """(truth, answer, right value); None: it may be judged a failure, but not right."""
    draw = random.Random(seed)
    made: list[tuple[str, str, float | None]] = []
    for _ in range(count):
        a, b, c = draw.randint(2, 99), draw.randint(2, 99), draw.randint(2, 9)
        truth, same, other = draw.choice(
            [
                (f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a * c}}}{{{b * c}}}", f"\\frac{{{a}}}{{{b + 1}}}"),
                (f"{a * b}", f"x = {a} \\cdot {b}", f"{a * b + c}"),
                (f"\\sqrt{{{a * a * b}}}", f"{a}\\sqrt{{{b}}}", f"{a + 1}\\sqrt{{{b}}}"),
                (f"(x+{a})^2", f"x^2+{2 * a}x+{a * a}", f"x^2+{a}x+{a * a}"),
            ]
        )
        if draw.random() < share:
            made.append((truth, draw.choice(HOPELESS), None))
        elif draw.random() < 0.5:
            made.append((truth, same, 1.0))
        else:
            made.append((truth, other, 0.0))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--hopeless", type=float, default=0.01, help="share of hopeless answers (0.01)")
    parser.add_argument("--deadline", type=float, default=1.0, help="seconds for a pair (1)")
    parser.add_argument("--children", type=int, default=2)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    judge = MathJudge(deadline_s=arguments.deadline, children=arguments.children)
    # All children have started before the clock does.
    with ThreadPoolExecutor(arguments.children) as pool:
        list(pool.map(lambda _: judge.check_here("x+2", "x+1"), range(arguments.children)))
    work = pairs(arguments.pairs, arguments.hopeless, arguments.seed)
    lock, waiting, took, wrong, leaks, late = (
        threading.Lock(),
        threading.Semaphore(arguments.children),
        [],
        0,
        [],
        0,
    )
    hopeless_right = late_answerable = 0

    def check(pair: tuple[str, str, float | None]) -> None:
        nonlocal wrong, late, hopeless_right, late_answerable
        truth, answer, value = pair
        with waiting:  # so that what is timed is a pair, and not its wait for a child
            began = time.monotonic()
            got: float | None = None
            try:
                got = judge.check_here(answer, truth).value
            except ChildTimeoutError:
                with lock:
                    late += 1
            except ChildError:
                pass
            except Exception as error:  # noqa: BLE001 - what must not happen is counted
                with lock:
                    leaks.append(repr(error))
            seconds = time.monotonic() - began
        with lock:
            took.append(seconds)
            wrong += value is not None and got is not None and got != value
            late_answerable += value is not None and got is None
            hopeless_right += value is None and got == 1.0

    began = time.monotonic()
    with ThreadPoolExecutor(arguments.threads) as pool:
        list(pool.map(check, work))
    seconds = time.monotonic() - began
    p99 = statistics.quantiles(took, n=100)[98]
    found = {
        "pairs": len(work),
        "hopeless": sum(value is None for _, _, value in work),
        "pairs_per_second": round(len(work) / seconds, 1),
        "p50_ms": round(1000 * statistics.median(took), 1),
        "p99_ms": round(1000 * p99, 1),
        "deadline_ms": 1000 * arguments.deadline,
        "late": late,
        "late_though_answerable": late_answerable,
        "judged_wrongly": wrong,
        "hopeless_judged_right": hopeless_right,
        "leaked": leaks[:3],
    }
    print(json.dumps(found, indent=1))
    judge._children.close()
    # A child that is killed at its deadline takes a moment to die.
    return int(bool(wrong or leaks or hopeless_right or p99 > arguments.deadline + 0.5))


if __name__ == "__main__":
    sys.exit(main())
