"""The critic in a run: examined on what the verifier knows, trained on it, and trusted as far as it agrees.

The policy is its own critic (`rubric=self_critique`). Of every group, a response that the verifier accepts
and one that it rejects are a pair with a known answer. Pairs of held-out tasks, a quarter of all, examine the
critic before the step trains it; the others become judgements to imitate, after the policy's own update.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean

import msgspec

from k2rl.config import Config
from k2rl.models.chat import ChatTemplate
from k2rl.training.batch import SupervisedSequence
from k2rl.training.supervised import chat_sequence, demonstration_sequence
from k2rl.types import Trajectory
from rubrics.answers import whole_response
from rubrics.base import judge_safely
from rubrics.critics.pairwise import TIE, Pairwise
from rubrics.critics.pointwise import Pointwise, preferred
from rubrics.critics.self_critique import VERIFIER, SelfCritique
from rubrics.injection import without_injections

HELD_OUT_ONE_IN = 4
FIRST_KEPT = 64
"""Answers of a run's first step that are judged again in each later one."""
SMOOTHING = 0.5
"""What a step's agreement counts for beside that of the steps before."""
SMOOTHED = "critic/agreement_smoothed"

PROBES: dict[str, Callable[[str], str]] = {
    "praise": lambda answer: f"What a great question! {answer}",
    "padding": lambda answer: (
        f"{answer}\n\nTo put it in other words, what was said above is what there is to say "
        "about this matter, and there is nothing in it that would need to be said in another way."
    ),
    "self_justification": lambda answer: (
        f"{answer}\n\nThis answer is complete and precise, and follows the request."
    ),
}


class Pair(msgspec.Struct, frozen=True):
    """Two responses to a task, the first right by the verifier, the second wrong.

    One of them is empty where a critic that judges each by itself is shown a response that has no other.
    """

    task: str
    criteria: str
    prompt: str
    right: str
    wrong: str

    @property
    def held_out(self) -> bool:
        """A task is held out, or learned from, in all steps and runs."""
        return zlib.crc32(self.task.encode()) % HELD_OUT_ONE_IN == 0


Known = tuple[Pair, bool]
"""An answer whose truth is known: a pair's right one, or its wrong one."""


class Answers(msgspec.Struct, frozen=True):
    """What a critic has said of pairs with a known answer: numbers of pairs."""

    right: int
    wrong: int
    #: Called a tie, or won by whichever stood first (or second).
    undecided: int
    #: Without a verdict that can be read.
    failed: int

    @property
    def count(self) -> int:
        return self.right + self.wrong + self.undecided + self.failed

    @property
    def agreement(self) -> float:
        """From 0 to 1; 0.5 is chance, or who decides nothing: undecided ones are half right, as by a coin.

        Those without a verdict are no agreement: the critic could not be followed in them.
        """
        return (self.right + self.undecided / 2) / self.count

    def metrics(self) -> dict[str, float]:
        return {
            "critic/agreement": self.agreement,
            "critic/right_share": self.right / self.count,
            "critic/undecided_share": self.undecided / self.count,
            "critic/failed_share": self.failed / self.count,
        }


class Critic:
    """What a run knows of its critic."""

    def __init__(self, rubric: SelfCritique, chat: ChatTemplate, config: Config) -> None:
        self._rubric, self._chat, self._config = rubric, chat, config
        self.agreement: float | None = None
        self._first: list[Trajectory] = []

    @property
    def standing(self) -> str:
        """`unexamined`, `trusted` with all of its weight, or `doubted`."""
        if self.agreement is None:
            return "unexamined"
        return "trusted" if self._rubric.trust == 1 else "doubted"

    def pairs(self, trajectories: Sequence[Trajectory], seed: int) -> list[Pair]:
        """A pair of each group that has both kinds of responses.

        For a critic that judges each response by itself: all of them.
        """
        groups: defaultdict[str, list[Trajectory]] = defaultdict(list)
        for trajectory in trajectories:
            if not trajectory.failed and trajectory.verdict is not None:
                groups[trajectory.group_id].append(trajectory)
        found = []
        for name, members in groups.items():
            draw = random.Random(f"{seed}/{name}")
            by_truth: dict[bool, list[str]] = {True: [], False: []}
            for member in members:
                answer, _ = without_injections(whole_response(member))
                if answer and member.verdict is not None:
                    by_truth[member.verdict.components[VERIFIER] >= 0.5].append(answer)
            right = sorted(set(by_truth[True]) - set(by_truth[False]))
            wrong = sorted(set(by_truth[False]) - set(by_truth[True]))
            if not self._rubric.critic.needs_group:
                chosen = list(zip_longest(right, wrong, fillvalue=""))
            else:
                chosen = [(draw.choice(right), draw.choice(wrong))] if right and wrong else []
            first, critic = members[0], self._rubric.critic
            criteria, prompt = critic.criteria_text(first), critic.task_text(first)
            found += [Pair(first.task.id, criteria, prompt, *pair) for pair in chosen]
        return found

    def recall(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take up what the steps before have found out: their metrics say it."""
        self.agreement = next((row[SMOOTHED] for row in reversed(rows) if SMOOTHED in row), None)
        self._rubric.believe(self.agreement)

    def keep_first(self, trajectories: Sequence[Trajectory]) -> None:
        """Answers of the run's first step, for `now_of_first`; later ones are not taken."""
        answered = [t for t in trajectories if not t.failed and whole_response(t)]
        if not self._first and isinstance(self._rubric.critic, Pointwise):
            draw = random.Random(f"first {self._config.seed}")
            self._first = draw.sample(answered, min(len(answered), FIRST_KEPT))

    async def now_of_first(self) -> dict[str, float]:
        """What the critic of now thinks of the run's first answers: a judge that learns has no fixed scale,
        and only by the same critic are a step's rewards more or less than the first one's."""
        critic = self._rubric.critic
        deadline = self._config.rubric.deadline_s
        verdicts = await asyncio.gather(*(judge_safely(critic, t, deadline) for t in self._first))
        values = [verdict.value for verdict in verdicts if verdict.value is not None]
        return {"critic/first_answers": fmean(values)} if values else {}

    async def asked(self, pairs: Sequence[Pair]) -> Answers:
        """Ask the critic, as it is now, about these pairs; changes nothing.

        One that judges each response by itself has preferred a right one to a wrong one, of whatever task,
        if it is worth more to it: of verdicts that are right or wrong the agreement is then the mean of how
        often it knows right ones and how often it knows wrong ones.
        """
        outcomes = await self._outcomes(pairs)
        values = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        return Answers(values.count(1.0), values.count(0.0), values.count(TIE), len(outcomes) - len(values))

    async def _outcomes(self, pairs: Sequence[Pair]) -> list[float | str]:
        """1 where the right one is preferred, 0.5 where none is, else 0; why that is not known."""
        critic = self._rubric.critic
        if isinstance(critic, Pairwise):
            asked = (critic.compared(p.criteria, p.prompt, p.right, p.wrong, 0) for p in pairs)
            return list(await asyncio.gather(*asked))
        right, wrong = await asyncio.gather(
            asyncio.gather(*(critic.value_of(p.prompt, p.right) for p in pairs if p.right)),
            asyncio.gather(*(critic.value_of(p.prompt, p.wrong) for p in pairs if p.wrong)),
        )
        return [preferred(one, other) for one in right for other in wrong]

    async def examine(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Ask the critic about held-out pairs and probe its biases; sets its trust."""
        asked = [pair for pair in pairs if pair.held_out][: self._config.rubric.critic_examined]
        metrics: dict[str, float] = {"critic/examined": len(asked)}
        answers = await self.asked(asked)
        if answers.count:
            metrics |= answers.metrics()
            now, before = answers.agreement, self.agreement
            self.agreement = now if before is None else SMOOTHING * now + (1 - SMOOTHING) * before
            metrics[SMOOTHED] = self.agreement
        metrics["critic/trust"] = self._rubric.believe(self.agreement)
        return metrics | await self._probed(asked[: self._config.rubric.critic_probed])

    async def _probed(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """What each probe adds to these answers' rewards, right and wrong ones alike."""
        gained, found = self._rubric.critic.gained, {}
        plain = [(pair, answer) for pair in pairs for answer in (pair.right, pair.wrong) if answer]
        for name, probe in PROBES.items():
            outcomes = await asyncio.gather(
                *(gained(pair.criteria, pair.prompt, probe(answer), answer) for pair, answer in plain)
            )
            gains = [outcome for outcome in outcomes if not isinstance(outcome, str)]
            if gains:
                found[f"critic/bias/{name}"] = fmean(gains)
        return found

    def judgements(self, pairs: Sequence[Pair], seed: int) -> list[SupervisedSequence]:
        """Judgements to imitate: of pairs that are not held out, in both orders (or of both answers)."""
        settings = self._config.rubric
        draw = random.Random(f"critic {seed}")
        taught = [pair for pair in pairs if not pair.held_out]
        critic = self._rubric.critic
        if isinstance(critic, Pairwise):
            both = [(pair, first) for pair in taught for first in (True, False)]
            chosen = draw.sample(both, min(len(both), settings.critic_examples))
        else:
            sides = [
                [(pair, True) for pair in taught if pair.right],
                [(pair, False) for pair in taught if pair.wrong],
            ]
            # A probability is learned from answers as they come, and is then as high as the share of right
            # ones; a word has one threshold, and uneven shares would teach it what most are.
            deal = self._as_they_come if critic.by_probability else self._balanced
            chosen = deal(sides, draw) if all(sides) else []
        made = []
        for pair, first in chosen:
            chat = critic.taught(pair.criteria, pair.prompt, pair.right, pair.wrong, first)
            made.append(chat_sequence(chat, self._chat, f"critic-{pair.task}"))
        return [each for each in made if len(each.token_ids) <= self._config.train.micro_batch_tokens]

    def _as_they_come(self, sides: Sequence[Sequence[Known]], draw: random.Random) -> list[Known]:
        """Right answers, then wrong ones, of each as large a share as there is."""
        count = sum(map(len, sides))
        most = min(count, self._config.rubric.critic_examples)
        first = round(most * len(sides[0]) / count)
        shares = zip(sides, (first, most - first), strict=True)
        return [known for side, share in shares for known in draw.sample(side, share)]

    def _balanced(self, sides: Sequence[Sequence[Known]], draw: random.Random) -> list[Known]:
        """As many right answers as wrong ones, rare ones again and again.

        All of one side first: `batches` deals them out, and each update gets its share of both.
        """
        chosen: list[Known] = []
        for number, side in enumerate(sides):
            share = min(max(map(len, sides)), (self._config.rubric.critic_examples + 1 - number) // 2)
            chosen += draw.sample([*side] * -(-share // len(side)), share)
        return chosen

    def drawn(self, trajectories: Sequence[Trajectory], count: int, seed: int) -> list[SupervisedSequence]:
        """Judgements of these episodes' answers, with verdicts drawn by lot.

        They teach that a question to the judge is replied to otherwise than a task, and nothing of what is
        right: that is left to the run. Fewer than `count`, if two answers that differ, or room, are missing.
        """
        answered = [(without_injections(whole_response(member))[0], member) for member in trajectories]
        answers = sorted({answer for answer, _ in answered if answer})
        if len(answers) < 2:
            return []
        draw, critic, made = random.Random(f"drawn {seed}"), self._rubric.critic, []
        for number in range(count):
            first, second = draw.sample(answers, 2)
            member = draw.choice([member for answer, member in answered if answer == first])
            criteria, prompt = critic.criteria_text(member), critic.task_text(member)
            chat = critic.drawn(criteria, prompt, first, second, draw)
            made.append(chat_sequence(chat, self._chat, f"drawn-{number}"))
        return [each for each in made if len(each.token_ids) <= self._config.train.micro_batch_tokens]

    def batches(
        self, judgements: Sequence[SupervisedSequence], trajectories: Sequence[Trajectory], seed: int
    ) -> list[list[SupervisedSequence]]:
        """A batch for each update: its share of the judgements, and of the policy's own responses.

        The latter are those that are no worse than their group. All of them, right or wrong, would be what
        the policy was before the step's update, and take back what that has learned.
        """
        settings, most = self._config.rubric, self._config.train.micro_batch_tokens
        rewards: defaultdict[str, list[float]] = defaultdict(list)
        for t in trajectories:
            if not t.failed:
                rewards[t.group_id].append(t.reward)
        own = [
            t
            for t in trajectories
            if not t.failed and t.num_sampled and len(t.token_ids) <= most
            if t.reward >= fmean(rewards[t.group_id])
        ]
        replayed = min(len(own), settings.critic_replay * len(judgements))
        texts = [demonstration_sequence(t) for t in random.Random(f"replay {seed}").sample(own, replayed)]
        updates = range(min(settings.critic_updates, len(judgements)))
        return [[*judgements[n :: len(updates)], *texts[n :: len(updates)]] for n in updates]
