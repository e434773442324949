"""One answer after the other, by criteria."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any, Literal

from k2rl.types import Evidence, Message, Trajectory, Verdict
from rubrics.answers import opening, whole_response
from rubrics.asking import ask, ask_briefly, brief_prompt, weigh_briefly
from rubrics.asking import prompt as asking_prompt
from rubrics.criteria import Criteria, Criterion, check, from_task, load
from rubrics.critics.base import ModelJudge
from rubrics.injection import without_injections
from rubrics.models import JudgeError

Weights = dict[str, float]
"""How likely each choice is; those that are missing are not."""
KNOWN = "correct"
"""The criterion of the shipped rubric `correctness`."""
OVERALL = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]


class CriteriaRubric(ModelJudge):
    """What judges by criteria have in common: rubrics by name or file, and those of a task."""

    def __init__(
        self,
        model: Any,
        rubrics: Sequence[str] = ("core", "prescriptive"),
        field: str = "rubric",
        brief: bool = False,
        seed: int = 0,
    ) -> None:
        """`model`: `policy`, or `{url: …, name: …}`; `field` of `task.data`: further criteria, if any.

        `brief`: names of criteria, and a word for a verdict, for models that are too weak to follow
        instructions, give reasons and repeat a token.

        Raises:
            ValueError, ConfigError: one line, about the model or a rubric.
        """
        super().__init__(model, seed)
        self.brief = brief
        self.rubrics: list[Criteria] = [load(name) for name in rubrics]
        self.field = field
        if self.rubrics:
            check([criterion for rubric in self.rubrics for criterion in rubric.criteria])

    @property
    def identity(self) -> str:
        texts = "; ".join(f"{rubric.identity} {rubric!r}" for rubric in self.rubrics)
        return f"{super().identity} {texts}{' brief' if self.brief else ''}"

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
        own = trajectory.task.data.get(self.field)
        return [self.task_text(trajectory), whole_response(trajectory), own]

    def criteria_text(self, trajectory: Trajectory) -> str:
        """The criteria for a task, as this judge is told them."""
        criteria = self.criteria(trajectory)
        return ", ".join(criterion.name for criterion in criteria) if self.brief else described(criteria)

    def task_text(self, trajectory: Trajectory) -> str:
        """A task, as this judge is told it."""
        messages = opening(trajectory)
        if self.brief:
            return "\n".join(message.content for message in messages if message.role != "system")
        return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


class Pointwise(CriteriaRubric):
    """A model judges each answer: a choice for each criterion (`explicit`), or one for all (`implicit`).

    Asked briefly, it is asked about one criterion at a time. `by_probability`, an answer's value is then the
    mean of the choices' values under the probabilities that the model gives to their words (G-Eval, arXiv
    2303.16634): answers between which it would not change its word differ in it.
    """

    def __init__(
        self,
        model: Any,
        rubrics: Sequence[str] = ("core", "prescriptive"),
        aggregate: Literal["explicit", "implicit"] = "explicit",
        field: str = "rubric",
        brief: bool = False,
        by_probability: bool = False,
        seed: int = 0,
    ) -> None:
        """See `CriteriaRubric`.

        Raises:
            ValueError, ConfigError: one line, about what is wrong.
        """
        super().__init__(model, rubrics, field, brief, seed)
        if aggregate not in ("explicit", "implicit"):
            raise ValueError(f"aggregate={aggregate!r} must be explicit or implicit")
        if brief and aggregate == "implicit":
            raise ValueError("brief questions are about one criterion each: aggregate must be explicit")
        if by_probability and not brief:
            raise ValueError("by_probability needs brief=true: only a verdict of one word has a probability")
        self.aggregate, self.by_probability = aggregate, by_probability

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.aggregate}{' by probability' if self.by_probability else ''}"

    async def judge(self, trajectory: Trajectory) -> Verdict:
        criteria = self.criteria(trajectory)
        answer, injections = without_injections(whole_response(trajectory))
        if not answer:
            return self.worthless([*injections, Evidence("no answer", passed=False)])
        prompt = self.task_text(trajectory)
        if self.aggregate == "implicit":
            return await self._implicit(criteria, trajectory.id, prompt, answer, injections)
        weighed, reasoning = await self._asked(criteria, prompt, answer, trajectory.id)
        return self._explicit(criteria, weighed, [*injections, Evidence(reasoning)])

    async def _implicit(
        self, criteria: Sequence[Criterion], name: str, prompt: str, answer: str, injections: list[Evidence]
    ) -> Verdict:
        question = (
            f"{described(self._shuffled(criteria, name))}\n\n"
            "How good is the answer by all of these together, from 1 to 10?"
        )
        material = {"task": prompt, "answer": answer}
        reply = await ask(self.model, question, material, {"overall": OVERALL}, self.seed)
        value = OVERALL.index(reply.choices["overall"]) / (len(OVERALL) - 1)
        evidence = [*injections, Evidence(reply.reasoning)]
        return Verdict.scored(value, {"overall": value}, evidence=evidence, judge=self.judge_name)

    async def _asked(
        self, criteria: Sequence[Criterion], prompt: str, answer: str, name: str
    ) -> tuple[list[Weights], str]:
        """For each criterion how likely its choices are (a word is certain), and the reasoning.

        Raises:
            JudgeError: there is none for one of them.
        """
        if not self.brief:
            order = self._shuffled(criteria, name)
            question, material, choices = self._question(order, prompt, answer)
            reply = await ask(self.model, question, material, choices, self.seed)
            return [{reply.choices[criterion.name]: 1.0} for criterion in criteria], reply.reasoning
        asked = [self._brief_question(criterion, prompt, answer) for criterion in criteria]
        if self.by_probability:
            weighing = (weigh_briefly(self.model, *each, self.seed) for each in asked)
            return list(await asyncio.gather(*weighing)), ""
        words = await asyncio.gather(*(ask_briefly(self.model, *each, self.seed) for each in asked))
        return [{word: 1.0} for word in words], ""

    def _shuffled(self, criteria: Sequence[Criterion], name: str) -> list[Criterion]:
        """In another order for each answer, so that no criterion profits from its place."""
        return random.Random(f"{self.seed}/{name}").sample(criteria, len(criteria))

    def _question(
        self, criteria: Sequence[Criterion], prompt: str, answer: str
    ) -> tuple[str, dict[str, str], dict[str, list[str]]]:
        """The question, the material and the choices."""
        question = f"{described(criteria)}\n\nWhich choice fits the answer best, for each criterion?"
        choices = {criterion.name: criterion.labels for criterion in criteria}
        return question, {"task": prompt, "answer": answer}, choices

    def _brief_question(
        self, criterion: Criterion, prompt: str, answer: str
    ) -> tuple[str, dict[str, str], list[str]]:
        return f"{criterion.name}:", {"task": prompt, "answer": answer}, criterion.labels

    # What a critic learns and is examined in ----------------------------------------------------------

    def known(self) -> Criterion:
        """The criterion whose truth a verifier knows.

        Raises:
            ValueError: none of the rubrics has it.
        """
        for rubric in self.rubrics:
            for criterion in rubric.criteria:
                if criterion.name == KNOWN:
                    return criterion
        raise ValueError(
            f"none of the rubrics has the criterion {KNOWN!r}, whose truth the verifier knows: "
            "rubrics=[correctness, …]"
        )

    async def value_of(self, prompt: str, answer: str) -> float | str:
        """An answer's value by the known criterion, from 0 to 1; why there is none, if there is none."""
        if not answer:
            return 0.0
        known = self.known()
        try:
            (weights,), _ = await self._asked([known], prompt, answer, "")
        except JudgeError as error:
            return str(error)
        return mean_value(known, weights)

    async def gained(self, criteria: str, prompt: str, changed: str, plain: str) -> float | str:
        """By how much the changed answer is worth more than the plain one; why that is not known."""
        first, second = await asyncio.gather(self.value_of(prompt, changed), self.value_of(prompt, plain))
        if isinstance(first, str) or isinstance(second, str):
            return first if isinstance(first, str) else second
        return first - second

    def taught(self, criteria: str, prompt: str, right: str, wrong: str, first: bool) -> list[Message]:
        """The right judgement of the right answer (`first`) or of the wrong one: something to imitate."""
        return self._example(prompt, right if first else wrong, self.known().labels[-1 if first else 0])

    def drawn(self, criteria: str, prompt: str, one: str, other: str, draw: random.Random) -> list[Message]:
        """A judgement of the first answer, with a verdict drawn by lot."""
        return self._example(prompt, one, draw.choice(self.known().labels))

    def _example(self, prompt: str, answer: str, label: str) -> list[Message]:
        known = self.known()
        if self.brief:
            made = brief_prompt(*self._brief_question(known, prompt, answer))
        else:
            made = asking_prompt(*self._question([known], prompt, answer), self.seed)
        return [*made.messages, Message("assistant", made.verdict({known.name: label}))]

    def _explicit(
        self, criteria: Sequence[Criterion], weighed: Sequence[Weights], evidence: Sequence[Evidence]
    ) -> Verdict:
        values = {c.name: mean_value(c, of) for c, of in zip(criteria, weighed, strict=True)}
        total = math.fsum(criterion.weight for criterion in criteria)
        weights = {criterion.name: criterion.weight / total for criterion in criteria}
        # How likely it is that what is mandatory is met: 0 or 1, where the verdict is a word.
        met = {
            c.name: 1 - of.get(c.labels[0], 0.0)
            for c, of in zip(criteria, weighed, strict=True)
            if c.mandatory
        }
        broken = [Evidence("mandatory, and not met", name, passed=False) for name in met if met[name] < 0.5]
        # A mandatory criterion's own value is 0 already where it is not met.
        value = math.fsum(
            weights[name] * values[name] * math.prod(met[other] for other in met if other != name)
            for name in values
        )
        return Verdict.scored(
            min(1.0, max(0.0, value)), values, weights, [*evidence, *broken], self.judge_name
        )


def mean_value(criterion: Criterion, weights: Weights) -> float:
    """From 0 to 1: the mean of the choices' values."""
    value = math.fsum(weight * criterion.value(label) for label, weight in weights.items())
    return min(1.0, max(0.0, value))


def preferred(one: float | str, other: float | str) -> float | str:
    """1 if the first value is larger, 0.5 if both are equal, else 0; a problem with either stays one."""
    if isinstance(one, str) or isinstance(other, str):
        return one if isinstance(one, str) else other
    return 0.5 if one == other else float(one > other)


def described(criteria: Sequence[Criterion]) -> str:
    """The criteria as a prompt lists them."""
    return "\n".join(
        f"- {c.name}{' (mandatory)' if c.mandatory else ''}: {c.text.strip()} [{' | '.join(c.labels)}]"
        for c in criteria
    )
