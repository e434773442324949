"""Composed instructions, and claims of having followed them."""

from __future__ import annotations

from typing import Any

from k2rl.types import Evidence, Verdict
from rubrics.verifiers.base import TaskError, Verifier
from rubrics.verifiers.instructions import text
from rubrics.verifiers.instructions.checkers import instruction
from rubrics.verifiers.instructions.claims import false_claims


class InstructionJudge(Verifier):
    """Whether the answer follows all of `task.data["instructions"]`; false claims of itself cost all.

    The value is 1 if all are followed and 0 if not, or their share with `share: true`. Each is a component.
    """

    def __init__(
        self,
        field: str = "instructions",
        place: str = "whole",
        share: bool = False,
        check_claims: bool = True,
    ) -> None:
        super().__init__(field, place)
        self.share, self.check_claims = share, check_claims

    async def check(self, answer: str, truth: Any) -> Verdict:
        if not isinstance(truth, list) or not truth:
            raise TaskError(f"{self.field!r} is no list of instructions")
        try:
            instructions = [instruction(spec) for spec in truth]
        except ValueError as error:
            raise TaskError(str(error)) from error
        if not text.words(answer):
            return Verdict.scored(0.0, evidence=[Evidence("an answer without a word", passed=False)])
        components: dict[str, float] = {}
        evidence: list[Evidence] = []
        for number, (spec, found) in enumerate(zip(truth, instructions, strict=True), 1):
            problem = found.problem(answer)
            name = f"{number}_{spec['id']}"
            components[name] = float(not problem)
            evidence.append(Evidence(problem or "followed", name, not problem))
        followed = sum(components.values()) / len(components)
        value = followed if self.share else float(followed == 1.0)
        if self.check_claims and (lies := false_claims(answer)):
            components["claims"] = 0.0
            return Verdict.scored(0.0, components, evidence=[*evidence, *lies])
        return Verdict.scored(value, components, evidence=evidence)
