"""One answer after the other, by criteria."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

from k2rl.types import Evidence, Trajectory, Verdict
from rubrics.answers import final_text
from rubrics.asking import Reply, ask
from rubrics.criteria import Criteria, Criterion, check, from_task, load
from rubrics.critics.base import ModelJudge
from rubrics.injection import without_injections

OVERALL = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]


class CriteriaRubric(ModelJudge):
    """What judges by criteria have in common: rubrics by name or file, and those of a task."""

    def __init__(
        self,
        model: Any,
        rubrics: Sequence[str] = ("core", "prescriptive"),
        field: str = "rubric",
        seed: int = 0,
    ) -> None:
        """`model`: `policy`, or `{url: …, name: …}`; `field` of `task.data`: further criteria, if any.

        Raises:
            ValueError, ConfigError: one line, about the model or a rubric.
        """
        super().__init__(model, seed)
        self.rubrics: list[Criteria] = [load(name) for name in rubrics]
        self.field = field
        if self.rubrics:
            check([criterion for rubric in self.rubrics for criterion in rubric.criteria])

    @property
    def identity(self) -> str:
        texts = "; ".join(f"{rubric.identity} {rubric!r}" for rubric in self.rubrics)
        return f"{super().identity} {texts}"

    def criteria(self, trajectory: Trajectory) -> list[Criterion]:
        """The criteria for a task.

        Raises:
            ValueError: there are none, or the task's make no sense.
        """
        found = [criterion for rubric in self.rubrics for criterion in rubric.criteria]
        if (own := trajectory.task.data.get(self.field)) is not None:
            found += from_task(own)
        check(found)
        return found

    def content(self, trajectory: Trajectory) -> object:
        return [prompt_of(trajectory), final_text(trajectory), trajectory.task.data.get(self.field)]


class Pointwise(CriteriaRubric):
    """A model judges each answer: a choice for each criterion (`explicit`), or one for all (`implicit`)."""

    def __init__(
        self,
        model: Any,
        rubrics: Sequence[str] = ("core", "prescriptive"),
        aggregate: Literal["explicit", "implicit"] = "explicit",
        field: str = "rubric",
        seed: int = 0,
    ) -> None:
        super().__init__(model, rubrics, field, seed)
        if aggregate not in ("explicit", "implicit"):
            raise ValueError(f"aggregate={aggregate!r} must be explicit or implicit")
        self.aggregate = aggregate

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.aggregate}"

    async def judge(self, trajectory: Trajectory) -> Verdict:
        criteria = self.criteria(trajectory)
        answer, injections = without_injections(final_text(trajectory))
        if not answer:
            return self.worthless([*injections, Evidence("no answer", passed=False)])
        # In another order for each answer, so that none profits from its place.
        order = random.Random(f"{self.seed}/{trajectory.id}").sample(criteria, len(criteria))
        material = {"task": prompt_of(trajectory), "answer": answer}
        if self.aggregate == "implicit":
            question = f"{described(order)}\n\nHow good is the answer by all of these together, from 1 to 10?"
            reply = await ask(self.model, question, material, {"overall": OVERALL}, self.seed)
            value = OVERALL.index(reply.choices["overall"]) / (len(OVERALL) - 1)
            evidence = [*injections, Evidence(reply.reasoning)]
            return Verdict.scored(value, {"overall": value}, evidence=evidence, judge=self.judge_name)
        question = f"{described(order)}\n\nWhich choice fits the answer best, for each criterion?"
        choices = {criterion.name: criterion.labels for criterion in order}
        reply = await ask(self.model, question, material, choices, self.seed)
        return self._explicit(criteria, reply, injections)

    def _explicit(self, criteria: Sequence[Criterion], reply: Reply, injections: list[Evidence]) -> Verdict:
        values = {criterion.name: criterion.value(reply.choices[criterion.name]) for criterion in criteria}
        total = math.fsum(criterion.weight for criterion in criteria)
        weights = {criterion.name: criterion.weight / total for criterion in criteria}
        evidence = [*injections, Evidence(reply.reasoning)]
        broken = [c.name for c in criteria if c.mandatory and values[c.name] == 0]
        evidence += [Evidence("mandatory, and not met", name, passed=False) for name in broken]
        value = 0.0 if broken else math.fsum(weights[name] * values[name] for name in values)
        return Verdict.scored(min(1.0, value), values, weights, evidence, self.judge_name)


def prompt_of(trajectory: Trajectory) -> str:
    """The conversation before the policy's last turn."""
    last = max((i for i, m in enumerate(trajectory.messages) if m.role == "assistant"), default=None)
    return "\n\n".join(f"{m.role}: {m.content}" for m in trajectory.messages[:last])


def described(criteria: Sequence[Criterion]) -> str:
    """The criteria as a prompt lists them."""
    return "\n".join(
        f"- {c.name}{' (mandatory)' if c.mandatory else ''}: {c.text.strip()} [{' | '.join(c.labels)}]"
        for c in criteria
    )
