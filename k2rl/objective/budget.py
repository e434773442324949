"""Token budgets: how much an episode may sample, and what overrunning it costs.

Kimi K2 (arXiv 2507.20534, section 3.2.3): a budget for each task type; responses over it are truncated
and penalised. K2 publishes neither budgets nor penalty.
"""

from __future__ import annotations

from k2rl.config import BudgetConfig
from k2rl.types import StopReason


def budget_for(kind: str, config: BudgetConfig) -> int:
    """Sampled tokens an episode of this task kind may use."""
    return config.per_kind.get(kind, config.default)


def penalised_reward(reward: float, stop_reason: StopReason, config: BudgetConfig) -> float:
    """The reward, less the penalty where the episode was truncated at its token budget.

    Other ends (the environment's own truncation, the turn limit) are not the budget's business.
    """
    return reward - config.penalty if stop_reason == "token_budget" else reward
