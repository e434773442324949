"""K2's self-critique: a verifier, and the policy's own judgements as far as the verifier bears them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from k2rl.types import Trajectory, Verdict
from rubrics.compose import Part, WeightedSum, part_from, values_of
from rubrics.critics.pairwise import Pairwise
from rubrics.critics.pointwise import Pointwise

VERIFIER, CRITIC = "verifier", "critic"
CHANCE = 0.5
"""Agreement of who says nothing."""


class SelfCritique(WeightedSum):
    """A verifier's value, and the critic's by a `weight` that agreement with the verifier earns it.

    `trust`, from 0 to 1, is the share of its weight that the critic has. A run sets it from what it finds on
    held-out pairs; nobody has trust to begin with, and a critic without it is not asked. With
    `verifier_weight=0` the reward is the critic's value times its trust: what the verifier knows then
    examines and trains the critic, and is not rewarded.
    """

    def __init__(
        self,
        verifier: Any = "environment_reward",
        model: Any = "policy",
        rubrics: Sequence[str] = ("correctness", "core", "prescriptive"),
        judge: Literal["pairwise", "pointwise"] = "pairwise",
        verifier_weight: float = 1.0,
        weight: float = 0.5,
        threshold: float = 0.7,
        brief: bool = False,
        by_probability: bool = False,
        deadline_s: float = 600.0,
        seed: int = 0,
    ) -> None:
        """`judge`: whether the critic compares a group's responses (its value is the share that a response
        wins, on average one half), or judges each (and says what it is worth). `weight` of the critic
        beside `verifier_weight`; `threshold`: agreement from which it has all of it; `brief`: see
        `CriteriaRubric`, `by_probability` (of `pointwise`): see `Pointwise`.

        Raises:
            ValueError, ConfigError: one line, about what is wrong.
        """
        for name, value in (("weight", weight), ("verifier_weight", verifier_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be 0 or more")
        if not CHANCE < threshold <= 1:
            raise ValueError(f"threshold={threshold} must be above 0.5, at most 1")
        self.critic = _critic(judge, model, rubrics, brief, by_probability, seed)
        self.verifier_weight, self.weight = verifier_weight, weight
        self.threshold, self.trust = threshold, 0.0
        known = part_from(VERIFIER, verifier)
        asked = Part(CRITIC, self.critic, weight, deadline_s)
        super().__init__([msgspec.structs.replace(known, weight=verifier_weight), asked])
        # Also where each is judged by itself: evaluations are then the verifier's.
        self.needs_group = True

    def believe(self, agreement: float | None) -> float:
        """The trust that this agreement on held-out pairs earns; none, if there is none to be had."""
        earned = 0.0 if agreement is None else (agreement - CHANCE) / (self.threshold - CHANCE)
        self.trust = min(1.0, max(0.0, earned))
        return self.trust

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        if self.trust * self.weight > 0 or not self.verifier_weight:
            return await super().judge_group(trajectories)
        verdicts = await self.ask_group(self.judges[0], trajectories)
        return [self._whole({VERIFIER: verdict}) for verdict in verdicts]

    def combine(self, verdicts: Mapping[str, Verdict]) -> Verdict:
        values = values_of(verdicts)
        parts = {VERIFIER: self.verifier_weight, CRITIC: self.weight * self.trust}
        # Whoever judges alone is worth as much as it is trusted.
        total = math.fsum(parts[name] for name in values) if self.verifier_weight else self.weight
        weights = {name: parts[name] / total for name in values}
        value = math.fsum(weights[name] * number for name, number in values.items())
        return Verdict.scored(value, values, weights)


def _critic(
    judge: str, model: Any, rubrics: Sequence[str], brief: bool, by_probability: bool, seed: int
) -> Pairwise | Pointwise:
    if judge == "pairwise":
        if by_probability:
            raise ValueError("by_probability is of judge=pointwise: pairs are won, or tied")
        return Pairwise(model, rubrics, brief=brief, seed=seed)
    if judge != "pointwise":
        raise ValueError(f"judge={judge!r} must be pairwise or pointwise")
    made = Pointwise(model, rubrics, brief=brief, by_probability=by_probability, seed=seed)
    made.known()  # raises where there is nothing that the verifier could teach
    return made
