"""All responses to a task against each other: K2's self-critique, in both orders."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from typing import Any, Literal

from k2rl.types import Evidence, Message, Trajectory, Verdict
from rubrics.answers import whole_response
from rubrics.asking import ask, ask_briefly, brief_prompt
from rubrics.asking import prompt as asking_prompt
from rubrics.critics.pointwise import CriteriaRubric
from rubrics.critics.ranking import Outcomes, Pair, bradley_terry, round_robin, swiss_round, win_rates
from rubrics.injection import without_injections
from rubrics.models import JudgeError

TIE = 0.5
WINNERS = {"A": 1.0, "tie": TIE, "B": 0.0}
ROUNDS = 1000
"""More than any tournament has, so that a repeated question has a seed of its own."""


class Pairwise(CriteriaRubric):
    """A model compares the responses to a task by criteria; the reward is the share of comparisons won.

    Each pair is shown in both orders: only who wins in both has won, all else is a tie. A judge that mostly
    takes whichever stands first makes ties of most: with `repeats` those are shown again.
    """

    needs_group = True

    def __init__(
        self,
        model: Any,
        rubrics: Sequence[str] = ("core", "prescriptive"),
        reward: Literal["win_rate", "bradley_terry"] = "win_rate",
        full_up_to: int = 8,
        repeats: int = 1,
        brief: bool = False,
        field: str = "rubric",
        seed: int = 0,
    ) -> None:
        """Groups of `full_up_to` play every pair, larger ones a Swiss tournament. A pair that is a tie is
        shown up to `repeats` times (to a model that gives one answer to one question, that changes nothing).

        Raises:
            ValueError, ConfigError: one line, about what is wrong.
        """
        super().__init__(model, rubrics, field, brief, seed)
        if reward not in ("win_rate", "bradley_terry"):
            raise ValueError(f"reward={reward!r} must be win_rate or bradley_terry")
        if full_up_to < 2 or repeats < 1:
            raise ValueError("full_up_to must be 2 or more, repeats 1 or more")
        self.reward, self.full_up_to, self.repeats = reward, full_up_to, repeats

    async def judge(self, trajectory: Trajectory) -> Verdict:
        raise JudgeError("it compares the responses of a group, and was given one alone")

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        criteria, prompt = self.criteria_text(trajectories[0]), self.task_text(trajectories[0])
        cleaned = [without_injections(whole_response(trajectory)) for trajectory in trajectories]
        answers = [answer for answer, _ in cleaned]
        outcomes: Outcomes = []
        problems: list[str] = []

        async def play(pairs: Sequence[Pair], round: int) -> None:
            # Equal answers make equal questions: each is asked once.
            texts = dict.fromkeys(tuple(sorted((answers[i], answers[j]))) for i, j in pairs)
            asked = (self._settled(criteria, prompt, one, other, round) for one, other in texts)
            results = dict(zip(texts, await asyncio.gather(*asked), strict=True))
            for i, j in pairs:
                result = results[tuple(sorted((answers[i], answers[j])))]
                if isinstance(result, str):
                    problems.append(result)
                else:
                    outcomes.append((i, j, result if answers[i] <= answers[j] else 1 - result))

        count = len(trajectories)
        if count <= self.full_up_to:
            await play(round_robin(count, self.seed), 0)
        else:
            for round in range(math.ceil(math.log2(count)) + 2):
                await play(swiss_round(count, outcomes, self.seed), round)
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

    async def _settled(self, criteria: str, prompt: str, one: str, other: str, round: int) -> float | str:
        """As `compared`, again as long as it is a tie."""
        found: float | str = ""
        for repeat in range(self.repeats):
            result = await self.compared(criteria, prompt, one, other, round + ROUNDS * repeat)
            if not isinstance(result, str) or isinstance(found, str):
                found = result
            if not isinstance(found, str) and found != TIE:
                break
        return found

    async def compared(self, criteria: str, prompt: str, one: str, other: str, number: int) -> float | str:
        """The first one's outcome over both orders; why there is none, if there is none."""
        if one == other or not (one and other):
            # Without asking: equal ones are equal, and no answer is worse than any.
            return TIE if bool(one) == bool(other) else float(bool(one))
        try:
            first, second = await asyncio.gather(
                self._shown(criteria, prompt, one, other, number),
                self._shown(criteria, prompt, other, one, number),
            )
        except JudgeError as error:
            return str(error)
        return first if first == 1 - second else TIE

    async def _shown(self, criteria: str, prompt: str, first: str, second: str, number: int) -> float:
        question, material, options = self._question(criteria, prompt, first, second)
        seed = self.seed + number
        if self.brief:
            return WINNERS[await ask_briefly(self.model, question, material, options, seed)]
        reply = await ask(self.model, question, material, {"winner": options}, seed)
        return WINNERS[reply.choices["winner"]]

    async def gained(self, criteria: str, prompt: str, changed: str, plain: str) -> float | str:
        """By how much the changed answer wins more often than half of the time; why that is not known."""
        outcome = await self.compared(criteria, prompt, changed, plain, 0)
        return outcome if isinstance(outcome, str) else outcome - TIE

    def taught(self, criteria: str, prompt: str, right: str, wrong: str, first: bool) -> list[Message]:
        """The right judgement of two answers, the right one standing first or second."""
        answers = (right, wrong) if first else (wrong, right)
        return self.example(criteria, prompt, *answers, "A" if first else "B")

    def drawn(self, criteria: str, prompt: str, one: str, other: str, draw: random.Random) -> list[Message]:
        """A judgement of two answers, with a verdict drawn by lot."""
        return self.example(criteria, prompt, one, other, draw.choice(list(WINNERS)))

    def example(self, criteria: str, prompt: str, first: str, second: str, winner: str) -> list[Message]:
        """A comparison as this judge is asked for it, with the reply that is right: something to imitate."""
        question, material, options = self._question(criteria, prompt, first, second)
        if self.brief:
            made = brief_prompt(question, material, options)
        else:
            made = asking_prompt(question, material, {"winner": options}, self.seed)
        return [*made.messages, Message("assistant", made.verdict({"winner": winner}))]

    def _question(
        self, criteria: str, prompt: str, first: str, second: str
    ) -> tuple[str, dict[str, str], list[str]]:
        """The question, the material and the choices."""
        if self.brief:
            return f"Better ({criteria}):", {"task": prompt, "A": first, "B": second}, list(WINNERS)
        question = (
            f"{criteria}\n\nWhich answer is better by these criteria? What is mandatory comes first; the "
            "others you may weigh. The order in which the answers stand means nothing."
        )
        return question, {"task": prompt, "answer A": first, "answer B": second}, list(WINNERS)
