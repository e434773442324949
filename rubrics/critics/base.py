"""What judges that ask a model have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k2rl.types import Evidence, Verdict
from rubrics.base import Rubric
from rubrics.models import model_from


class ModelJudge(Rubric):
    """A judge that asks `model`, and names it in its verdicts."""

    idempotent = True

    def __init__(self, model: Any, seed: int = 0) -> None:
        """`model`: `policy`, or `{url: …, name: …}`.

        Raises:
            ValueError: one line, about the model.
        """
        self.model = model_from(model)
        self.seed = seed

    @property
    def identity(self) -> str:
        return f"{type(self).__name__}({self.model.identity}, seed {self.seed})"

    @property
    def judge_name(self) -> str:
        """Who judges, in verdicts."""
        return self.model.identity

    def worthless(self, evidence: Sequence[Evidence] = ()) -> Verdict:
        """The verdict on what needs no model: nothing, for these reasons, or since there is no answer."""
        reasons = [*evidence] or [Evidence("no answer", passed=False)]
        return Verdict.scored(0.0, evidence=reasons, judge=self.judge_name)

    async def close(self) -> None:
        close = getattr(self.model, "close", None)
        if close is not None:
            await close()
