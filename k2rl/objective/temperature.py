"""Sampling temperature over the run: high for exploration at first, lower later.

Kimi K2 (arXiv 2507.20534, section 3.2.3) decays it and publishes no schedule; ours are the usual shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from k2rl.config import TemperatureConfig
from k2rl.errors import ConfigError


def temperature_at(config: TemperatureConfig, step: int, total: int, rewards: Sequence[float] = ()) -> float:
    """The sampling temperature of RL step `step` of `total`, the first being 0.

    `rewards` are the mean rewards of the steps before, in order, which `reward` alone looks at.

    `linear` and `cosine` go from `start` at step 0 to `end` at the last step; `constant` stays at
    `start`; `step` is at `end` from the share `step_at` of the steps on; `reward` is at `end`
    once the mean reward of `reward_steps` steps in a row was `reward_at` or more, and stays there even
    if rewards fall. A run of one step uses `start`.

    Raises:
        ValueError: if the step is outside [0, total).
        ConfigError: if the schedule's name is unknown.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} is outside a run of {total} steps")
    progress = step / (total - 1) if total > 1 else 0.0
    if config.schedule == "constant":
        weight = 0.0
    elif config.schedule == "linear":
        weight = progress
    elif config.schedule == "cosine":
        weight = 0.5 * (1 - math.cos(math.pi * progress))
    elif config.schedule == "step":
        weight = float(step >= max(config.step_at * total, 1))
    elif config.schedule == "reward":
        ends = range(config.reward_steps, len(rewards) + 1)
        reached = (fmean(rewards[end - config.reward_steps : end]) >= config.reward_at for end in ends)
        weight = float(any(reached))
    else:
        raise ConfigError(
            f"temperature.schedule={config.schedule!r} is not one of: constant, linear, cosine, step, reward"
        )
    return config.start * (1 - weight) + config.end * weight
