"""Whether every sentence of an answer stands in its source, and which does not."""

from __future__ import annotations

import re
from typing import Any

from k2rl.types import Evidence, Trajectory, Verdict
from rubrics.answers import final_text
from rubrics.asking import ask
from rubrics.critics.base import ModelJudge
from rubrics.injection import without_injections
from rubrics.verifiers.base import TaskError
from rubrics.verifiers.instructions.text import sentences

AT_ONCE = 12
"""Sentences in one question to the model."""
CHOICES = ["supported", "unsupported", "no claim"]
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_QUOTED = re.compile(r"[\"“«]([^\"”»\n]{4,})[\"”»]")


class Faithfulness(ModelJudge):
    """The share of an answer's sentences that `task.data["source"]` supports; each that it does not is named.

    Numbers and quotations that are not in the source are unsupported, whatever the model thinks of them. A
    sentence without a claim counts for nothing, and an answer without one is worth nothing.
    """

    def __init__(self, model: Any, field: str = "source", seed: int = 0) -> None:
        super().__init__(model, seed)
        self.field = field

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.field}"

    def content(self, trajectory: Trajectory) -> object:
        return [final_text(trajectory), trajectory.task.data.get(self.field)]

    async def judge(self, trajectory: Trajectory) -> Verdict:
        source = trajectory.task.data.get(self.field)
        if not isinstance(source, str) or not source.strip():
            raise TaskError(f"task {trajectory.task.id} has no text {self.field!r} in its data")
        answer, injections = without_injections(final_text(trajectory))
        spans = sentences(answer)
        found: list[str] = []
        evidence = list(injections)
        for start in range(0, len(spans), AT_ONCE):
            found += await self._support(source, [answer[a:b] for a, b in spans[start : start + AT_ONCE]])
        for (a, b), said in zip(spans, found, strict=True):
            if reason := _invented(answer[a:b], source) or ("unsupported" if said == "unsupported" else ""):
                evidence.append(Evidence(f"{reason}: {answer[a:b]}"[:300], "supported", False, (a, b)))
        wrong = sum(item.span is not None for item in evidence)
        claims = wrong + sum(
            said == "supported" and not _invented(answer[a:b], source)
            for (a, b), said in zip(spans, found, strict=True)
        )
        if not claims:
            none = Evidence("no sentence with a claim", passed=False)
            return self.worthless([*evidence, none])
        share = 1 - wrong / claims
        return Verdict.scored(share, {"supported": share}, evidence=evidence, judge=self.judge_name)

    async def _support(self, source: str, texts: list[str]) -> list[str]:
        material = {"source": source} | {f"sentence {i}": text for i, text in enumerate(texts, 1)}
        question = (
            "For each sentence: does the source, and it alone, say so or make it follow? A sentence that "
            "claims nothing about the matter (a greeting, an offer) is `no claim`. If any part is not "
            "supported, the sentence is `unsupported`."
        )
        choices = {f"sentence {i}": CHOICES for i in range(1, len(texts) + 1)}
        reply = await ask(self.model, question, material, choices, self.seed)
        return list(reply.choices.values())


def _invented(sentence: str, source: str) -> str:
    """What of a sentence is certainly not in the source: numbers, and words in quotation marks."""
    known = {_plain(number) for number in _NUMBER.findall(source)}
    # A mark of a list, as in `1. First`, is no number of the text.
    for number in _NUMBER.findall(re.sub(r"^\s*\d{1,2}[.)]\s", "", sentence)):
        if _plain(number) not in known:
            return f"{number} is not in the source"
    for quoted in _QUOTED.findall(sentence):
        if " ".join(quoted.split()).casefold().rstrip(".,") not in " ".join(source.split()).casefold():
            return f"{quoted[:40]!r} is not in the source"
    return ""


def _plain(number: str) -> str:
    return number.replace(",", "").rstrip(".")
