"""The form of an answer: its sections, and whether it repeats itself."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

from k2rl.types import Evidence, Trajectory, Verdict
from rubrics.answers import final_text
from rubrics.base import Rubric
from rubrics.verifiers.base import decided
from rubrics.verifiers.instructions.text import words


class FormatJudge(Rubric):
    """1 if the last turn consists of these tags, each once, in order, with content, and of nothing else."""

    idempotent = True

    def __init__(self, tags: Sequence[str] = ("think", "answer")) -> None:
        """Raises:
        ValueError: a tag is no plain word, or twice there.
        """
        if not tags or len(set(tags)) != len(tags) or not all(re.fullmatch(r"\w+", tag) for tag in tags):
            raise ValueError(f"tags={list(tags)} must be different plain words")
        self.tags = tuple(tags)
        self._whole = re.compile(r"\s*".join(rf"<{tag}>(.*?)</{tag}>" for tag in self.tags), re.DOTALL)

    @property
    def identity(self) -> str:
        return f"FormatJudge({', '.join(self.tags)})"

    def content(self, trajectory: Trajectory) -> object:
        return _last(trajectory)

    async def judge(self, trajectory: Trajectory) -> Verdict:
        turn = _last(trajectory)
        for tag in self.tags:
            for spelled in (f"<{tag}>", f"</{tag}>"):
                if turn.count(spelled) != 1:
                    return decided(False, f"{turn.count(spelled)} times {spelled}")
        found = self._whole.fullmatch(turn.strip())
        if not found:
            return decided(False, "text outside of the tags, or another order")
        empty = [tag for tag, body in zip(self.tags, found.groups(), strict=True) if not words(body)]
        return decided(not empty, f"<{empty[0]}> is empty" if empty else "as it should be")


class RepetitionJudge(Rubric):
    """1 without repetition, down to 0: `most` of the `n`-grams are repeated, or of the text packs away."""

    idempotent = True

    def __init__(self, n: int = 4, most: float = 0.5, free: float = 0.2) -> None:
        """`free`: the share that costs nothing.

        Raises:
            ValueError: unless `0 <= free < most <= 1` and `n >= 1`.
        """
        if n < 1 or not 0 <= free < most <= 1:
            raise ValueError(f"n={n} must be above 0, and 0 <= free={free} < most={most} <= 1")
        self.n, self.most, self.free = n, most, free

    @property
    def identity(self) -> str:
        return f"RepetitionJudge({self.n}, {self.most}, {self.free})"

    def content(self, trajectory: Trajectory) -> object:
        return final_text(trajectory)

    async def judge(self, trajectory: Trajectory) -> Verdict:
        answer = final_text(trajectory)
        if not answer:
            return decided(False, "no answer")
        shares = {"ngrams": repeated_ngrams(answer, self.n), "packed": packed_away(answer)}
        worst = max(shares.values())
        value = 1 - min(1.0, max(0.0, (worst - self.free) / (self.most - self.free)))
        text = f"{shares['ngrams']:.0%} of {self.n}-grams repeated, {shares['packed']:.0%} packs away"
        return Verdict.scored(value, shares, evidence=[Evidence(text, passed=value == 1)])


def repeated_ngrams(text: str, n: int) -> float:
    """Share of a text's n-grams of words (characters, where it has no spaces) that were there before."""
    units: Sequence[str] = [word.casefold() for word in words(text)]
    if len(units) < 2 * n and len(text) > 20 * n:
        units = list(text)
    grams = Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def packed_away(text: str) -> float:
    """Share of a long text that a compressor saves beyond what it saves of ordinary prose (about 60 %)."""
    data = text.encode("utf-8", "replace")
    if len(data) < 400:
        return 0.0
    return max(0.0, 1 - len(zlib.compress(data, 9)) / len(data) / 0.35)


def _last(trajectory: Trajectory) -> str:
    return next((m.content for m in reversed(trajectory.messages) if m.role == "assistant"), "")
