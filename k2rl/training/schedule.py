"""Learning rates over the steps of supervised training. No torch."""

from __future__ import annotations

import math

from k2rl.config import ScheduleConfig


def learning_rate(peak: float, schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The learning rate of a step.

    It rises linearly over `warmup_steps`, stays at the peak until `decay_from`, and then falls to `end` of
    the peak, which the last step has. With `decay_from` at 0.8, say, this is the warm-up, stable, decay of
    K2's pre-training (arXiv 2507.20534, section 2.5).

    Args:
        peak: the largest learning rate.
        schedule: its form.
        step: from 1.
        steps: how many there are.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    first = max(schedule.warmup_steps, round(schedule.decay_from * steps))
    if schedule.name == "constant" or step <= first:
        return peak
    done = (step - first) / (steps - first)
    share = 1 - done if schedule.name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (schedule.end + (1 - schedule.end) * share)
