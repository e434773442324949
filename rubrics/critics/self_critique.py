"""K2's self-critique: a verifier, and the policy's own comparisons as far as the verifier bears them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from k2rl.types import Trajectory, Verdict
from rubrics.compose import Part, WeightedSum, part_from, values_of
from rubrics.critics.pairwise import Pairwise

VERIFIER, CRITIC = "verifier", "critic"
CHANCE = 0.5
"""Agreement of who says nothing."""


class SelfCritique(WeightedSum):
    """A verifier's value, and the critic's by a `weight` that agreement with the verifier earns it.

    `trust`, from 0 to 1, is the share of its weight that the critic has. A run sets it from what it finds on
    held-out pairs; nobody has trust to begin with, and a critic without it is not asked.
    """

    def __init__(
        self,
        verifier: Any = "environment_reward",
        model: Any = "policy",
        rubrics: Sequence[str] = ("correctness", "core", "prescriptive"),
        weight: float = 0.5,
        threshold: float = 0.7,
        brief: bool = False,
        deadline_s: float = 600.0,
        seed: int = 0,
    ) -> None:
        """`weight` of the critic beside the verifier's 1; `threshold`: agreement from which it has all of it;
        `brief`: see `Pairwise`.

        Raises:
            ValueError, ConfigError: one line, about what is wrong.
        """
        if not (math.isfinite(weight) and weight >= 0) or not CHANCE < threshold <= 1:
            raise ValueError(f"weight={weight} must be 0 or more, threshold={threshold} above 0.5, at most 1")
        self.critic = Pairwise(model, rubrics, brief=brief, seed=seed)
        self.weight, self.threshold, self.trust = weight, threshold, 0.0
        super().__init__([part_from(VERIFIER, verifier), Part(CRITIC, self.critic, weight, deadline_s)])

    def believe(self, agreement: float | None) -> float:
        """The trust that this agreement on held-out pairs earns; none, if there is none to be had."""
        earned = 0.0 if agreement is None else (agreement - CHANCE) / (self.threshold - CHANCE)
        self.trust = min(1.0, max(0.0, earned))
        return self.trust

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        if self.trust * self.weight > 0:
            return await super().judge_group(trajectories)
        verdicts = await self.ask_group(self.judges[0], trajectories)
        return [self._whole({VERIFIER: verdict}) for verdict in verdicts]

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        values = values_of(verdicts)
        parts = {VERIFIER: 1.0, CRITIC: self.weight * self.trust}
        total = math.fsum(parts[name] for name in values)
        weights = {name: parts[name] / total for name in values}
        value = math.fsum(weights[name] * number for name, number in values.items())
        return Verdict.scored(value, values, weights)
