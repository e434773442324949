"""Token budgets: how much an episode may sample, and how a reward depends on the tokens it took.

Kimi K2 (arXiv 2507.20534, section 3.2.3): a budget for each task type; responses over it are truncated
and penalised. K2 publishes neither budgets nor penalty. Beside it k1.5's length reward (arXiv 2501.12599,
section 2.3.3) and Toggle of the K2.5 report, each within a group, so that they need no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from k2rl.config import BudgetConfig
from k2rl.types import StopReason


def budget_for(kind: str, config: BudgetConfig) -> int:
    """Sampled tokens an episode of this task kind may use."""
    return config.per_kind.get(kind, config.default)


def shaped_rewards(
    rewards: Sequence[float],
    lengths: Sequence[int],
    stop_reasons: Sequence[StopReason],
    config: BudgetConfig,
    step: int,
) -> list[float]:
    """The rewards of a group to learn from.

    Args:
        rewards: the judge's, one a response.
        lengths: sampled tokens of each.
        stop_reasons: why each ended.
        config: which of the three apply.
        step: of the run, from 1.

    Returns:
        One a response, in order: after Toggle, plus the length reward, less the penalty for truncation.
    """
    correct = [reward > config.correct_above for reward in rewards]
    shaped = list(rewards)
    if config.toggle_steps and (step - 1) // config.toggle_steps % 2 == 0:
        limit = _own_budget(lengths, correct, config)
        shaped = [r if length <= limit else min(r, 0.0) for r, length in zip(shaped, lengths, strict=True)]
    if config.length_weight and step > config.length_warmup_steps:
        bonuses = length_rewards(lengths, correct)
        shaped = [r + config.length_weight * bonus for r, bonus in zip(shaped, bonuses, strict=True)]
    return [penalised_reward(r, why, config) for r, why in zip(shaped, stop_reasons, strict=True)]


def penalised_reward(reward: float, stop_reason: StopReason, config: BudgetConfig) -> float:
    """The reward, less the penalty where the episode was truncated at its token budget, or repeated itself.

    Other ends (the environment's own truncation, the turn limit) are not the budget's business.
    """
    return reward - config.penalty if stop_reason in ("token_budget", "repetition") else reward


def length_rewards(lengths: Sequence[int], correct: Sequence[bool]) -> list[float]:
    """k1.5's length reward of each response in a group: from 0.5 of the shortest to -0.5 of the longest.

    A wrong response gets nothing for being short. All 0 where all are of one length.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    values = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [value if right else min(0.0, value) for value, right in zip(values, correct, strict=True)]


def _own_budget(lengths: Sequence[int], correct: Sequence[bool], config: BudgetConfig) -> float:
    """Toggle's budget of a group: the nearest-rank percentile of the lengths of its correct responses.

    No limit where too few are correct: a task must be solved before it is solved briefly. K2.5 estimates the
    budget once, at the start; here it is the group's own, as few tasks are drawn twice.
    """
    if sum(correct) < max(config.toggle_accuracy * len(correct), 1):
        return math.inf
    right = sorted(length for length, is_right in zip(lengths, correct, strict=True) if is_right)
    return right[max(math.ceil(config.toggle_percentile / 100 * len(right)), 1) - 1]
