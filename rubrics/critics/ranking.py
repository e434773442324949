"""From comparisons of pairs to rewards. Pure; outcomes are the first one's: 1 won, 0 lost, 0.5 a tie."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Pair = tuple[int, int]
Outcomes = list[tuple[int, int, float]]


def round_robin(count: int, seed: int) -> list[Pair]:
    """Every pair once, in an order and with a first one that the seed draws."""
    draw = random.Random(f"round robin {seed}")
    pairs = [(i, j) if draw.random() < 0.5 else (j, i) for i in range(count) for j in range(i)]
    draw.shuffle(pairs)
    return pairs


def swiss_round(count: int, outcomes: Outcomes, seed: int) -> list[Pair]:
    """The next round of a Swiss tournament: neighbours in points, that have not met if it can be."""
    draw = random.Random(f"swiss {seed} {len(outcomes)}")
    points = [0.0] * count
    met = set()
    for i, j, outcome in outcomes:
        points[i] += outcome
        points[j] += 1 - outcome
        met.add(frozenset((i, j)))
    waiting = sorted(range(count), key=lambda i: (-points[i], draw.random()))
    pairs = []
    while len(waiting) > 1:
        first = waiting.pop(0)
        new = (k for k, other in enumerate(waiting) if frozenset((first, other)) not in met)
        pairs.append((first, waiting.pop(next(new, 0))))
    return pairs


def win_rates(count: int, outcomes: Outcomes) -> list[float | None]:
    """Each one's share of its comparisons won; None for who has none."""
    won, played = [0.0] * count, [0] * count
    for i, j, outcome in outcomes:
        won[i] += outcome
        won[j] += 1 - outcome
        played[i] += 1
        played[j] += 1
    return [w / n if n else None for w, n in zip(won, played, strict=True)]


def bradley_terry(count: int, outcomes: Outcomes, prior: float = 0.1, steps: int = 500) -> list[float | None]:
    """The chance of each to win against the average of the others (Bradley and Terry, 1952); None as above.

    With `prior` ties against everybody the maximum is finite, also for who won or lost everything.
    """
    wins = [[prior / 2] * count for _ in range(count)]
    played = [0] * count
    for i, j, outcome in outcomes:
        wins[i][j] += outcome
        wins[j][i] += 1 - outcome
        played[i] += 1
        played[j] += 1
    strength = [1.0] * count
    for _ in range(steps):  # the minorise-maximise iteration of Hunter (2004)
        new = []
        for i in range(count):
            won = math.fsum(wins[i][j] for j in range(count) if j != i)
            games = math.fsum(
                (wins[i][j] + wins[j][i]) / (strength[i] + strength[j]) for j in range(count) if j != i
            )
            new.append(won / games if games else 1.0)
        mean = math.exp(math.fsum(map(math.log, new)) / count)
        new = [value / mean for value in new]
        moved = max(abs(math.log(a / b)) for a, b in zip(new, strength, strict=True))
        strength = new
        if moved < 1e-10:
            break
    return [
        math.fsum(s / (s + other) for j, other in enumerate(strength) if j != i) / (count - 1)
        if played[i]
        else None
        for i, s in enumerate(strength)
    ]


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings: 1 the same order, -1 the reverse; 0 where one is all ties."""
    concordant = discordant = ties_one = ties_other = 0
    for i in range(len(one)):
        for j in range(i):
            a, b = one[i] - one[j], other[i] - other[j]
            ties_one += a == 0
            ties_other += b == 0
            concordant += a * b > 0
            discordant += a * b < 0
    pairs = len(one) * (len(one) - 1) // 2
    scale = math.sqrt((pairs - ties_one) * (pairs - ties_other))
    return (concordant - discordant) / scale if scale else 0.0
