"""All responses to a task against each other: K2's self-critique, in both orders."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, Literal

from k2rl.types import Evidence, Message, Trajectory, Verdict
from rubrics.answers import final_text
from rubrics.asking import ask
from rubrics.asking import prompt as asking_prompt
from rubrics.critics.pointwise import CriteriaRubric, described, prompt_of
from rubrics.critics.ranking import Outcomes, Pair, bradley_terry, round_robin, swiss_round, win_rates
from rubrics.injection import without_injections
from rubrics.models import JudgeError

WINNERS = {"A": 1.0, "tie": 0.5, "B": 0.0}


class Pairwise(CriteriaRubric):
    """A model compares the responses to a task by criteria; the reward is the share of comparisons won.

    Each pair is shown in both orders: only who wins in both has won, all else is a tie.
    """

    needs_group = True

    def __init__(
        self,
        model: Any,
        rubrics: Sequence[str] = ("core", "prescriptive"),
        reward: Literal["win_rate", "bradley_terry"] = "win_rate",
        full_up_to: int = 8,
        repeats: int = 1,
        token: bool = True,
        field: str = "rubric",
        seed: int = 0,
    ) -> None:
        """Groups of `full_up_to` play every pair, larger ones a Swiss tournament, `repeats` times.

        Without `token` a verdict need not repeat one, which small models fail at.

        Raises:
            ValueError, ConfigError: one line, about what is wrong.
        """
        super().__init__(model, rubrics, field, seed)
        if reward not in ("win_rate", "bradley_terry"):
            raise ValueError(f"reward={reward!r} must be win_rate or bradley_terry")
        if full_up_to < 2 or repeats < 1:
            raise ValueError("full_up_to must be 2 or more, repeats 1 or more")
        self.reward, self.full_up_to, self.repeats = reward, full_up_to, repeats
        self.token = token

    async def judge(self, trajectory: Trajectory) -> Verdict:
        raise JudgeError("it compares the responses of a group, and was given one alone")

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        criteria = described(self.criteria(trajectories[0]))
        cleaned = [without_injections(final_text(trajectory)) for trajectory in trajectories]
        answers = [answer for answer, _ in cleaned]
        prompt = prompt_of(trajectories[0])
        outcomes: Outcomes = []
        problems: list[str] = []

        async def play(pairs: Sequence[Pair], number: int) -> None:
            results = await asyncio.gather(
                *(self.compared(criteria, prompt, answers[i], answers[j], number) for i, j in pairs)
            )
            for (i, j), result in zip(pairs, results, strict=True):
                if isinstance(result, str):
                    problems.append(result)
                else:
                    outcomes.append((i, j, result))

        count = len(trajectories)
        for repeat in range(self.repeats):
            if count <= self.full_up_to:
                await play(round_robin(count, self.seed + repeat), repeat)
            else:
                for round in range(math.ceil(math.log2(count)) + 2):
                    await play(swiss_round(count, outcomes, self.seed), repeat * 1000 + round)
        to_rewards = win_rates if self.reward == "win_rate" else bradley_terry
        rewards = to_rewards(count, outcomes)
        ties = sum(outcome == 0.5 for _, _, outcome in outcomes) / len(outcomes) if outcomes else 0.0
        return [self._verdict(reward, ties, cleaned[i][1], problems) for i, reward in enumerate(rewards)]

    def _verdict(
        self, reward: float | None, ties: float, injections: list[Evidence], problems: list[str]
    ) -> Verdict:
        if reward is None:
            first = problems[0] if problems else "nobody to compare it with"
            return Verdict.failed(f"no comparison of this answer can be used: {first}", self.judge_name)
        components = {"preferred": reward, "ties": ties}
        return Verdict.scored(
            reward, components, {"preferred": 1.0, "ties": 0.0}, injections, self.judge_name
        )

    async def compared(self, criteria: str, prompt: str, one: str, other: str, number: int) -> float | str:
        """The first one's outcome over both orders; why there is none, if there is none."""
        if one == other or not (one and other):
            # Without asking: equal ones are equal, and no answer is worse than any.
            return 0.5 if bool(one) == bool(other) else float(bool(one))
        try:
            first, second = await asyncio.gather(
                self._shown(criteria, prompt, one, other, number),
                self._shown(criteria, prompt, other, one, number),
            )
        except JudgeError as error:
            return str(error)
        return first if first == 1 - second else 0.5

    async def _shown(self, criteria: str, prompt: str, first: str, second: str, number: int) -> float:
        question, material = _question(criteria, prompt, first, second)
        choices = {"winner": list(WINNERS)}
        reply = await ask(self.model, question, material, choices, self.seed + number, self.token)
        return WINNERS[reply.choices["winner"]]

    def example(self, criteria: str, prompt: str, first: str, second: str, winner: str) -> list[Message]:
        """A comparison as this judge is asked for it, with the reply that is right: something to imitate."""
        question, material = _question(criteria, prompt, first, second)
        made = asking_prompt(question, material, {"winner": list(WINNERS)}, self.seed, self.token)
        return [*made.messages, Message("assistant", made.verdict({"winner": winner}))]


def _question(criteria: str, prompt: str, first: str, second: str) -> tuple[str, dict[str, str]]:
    question = (
        f"{criteria}\n\nWhich answer is better by these criteria? What is mandatory comes first; the others "
        "you may weigh. The order in which the answers stand means nothing."
    )
    return question, {"task": prompt, "answer A": first, "answer B": second}
