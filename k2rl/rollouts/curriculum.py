"""Which tasks a step draws: as they come, those that fail more often, or at first those that succeed.

Kimi k1.5 (arXiv 2501.12599, section 2.3.4): curriculum sampling from easy to hard, and prioritised sampling
with p ∝ 1 - success rate. Its tasks are a fixed set with known difficulties; a stream of tasks may never
give one twice, and then its kind stands for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from k2rl.config import RolloutConfig
from k2rl.rollouts.history import Means
from k2rl.rollouts.iteration import Draw
from k2rl.seeds import derive_seed
from k2rl.types import Task

#: Of a task that nothing is known of.
UNKNOWN = 0.5
#: Weight of a task that always succeeds (or, in a curriculum's beginning, never): none is left out for good.
LEAST = 0.05


def prioritised(draw: Draw, config: RolloutConfig, seed: int, success: Means) -> Draw:
    """Draws that choose, by weight, among `config.candidates` times as many tasks as they give."""
    if config.sampling == "stream":
        return draw

    async def choose(step: int, number: int) -> list[Task]:
        first, count = number * config.candidates, config.candidates
        batches = [await draw(step, first + n) for n in range(count)]
        tasks = [task for batch in batches for task in batch]
        weights = [weight(success.expected(task, UNKNOWN), step, config) for task in tasks]
        return chosen(tasks, weights, len(batches[0]), derive_seed(seed, "draw", step, number))

    return choose


def weight(success: float, step: int, config: RolloutConfig) -> float:
    """Of a task that succeeds so often, at a step from 1: its chance to be drawn, up to a factor."""
    hard = 1.0
    if config.sampling == "curriculum":
        hard = min((step - 1) / config.curriculum_steps, 1.0)
    return max(hard * (1 - success) + (1 - hard) * success, LEAST)


def chosen(tasks: Sequence[Task], weights: Sequence[float], count: int, seed: int) -> list[Task]:
    """`count` of the tasks, in their order, drawn one after the other with these weights, none twice.

    The largest `u ** (1 / weight)` for uniform `u` (Efraimidis and Spirakis 2006).
    """
    draws = random.Random(seed)
    keys = [draws.random() ** (1 / w) for w in weights]
    best = sorted(range(len(tasks)), key=lambda i: -keys[i])[:count]
    return [tasks[i] for i in sorted(best)]
