"""Judging whole groups as their episodes end, in whatever order and with few episodes at once."""

from __future__ import annotations

import asyncio
import math

import pytest

from envs.calculator import CalculatorEnv
from k2rl.config import Config
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.engine_model import EngineModel
from k2rl.rollouts.episode import Attempt
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.types import Message, Verdict
from rubrics import EnvironmentReward, Rubric
from rubrics.models import JudgeError


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


class Answering:
    """Answers with the seed's last digit."""

    def __init__(self, chat: ChatTemplate) -> None:
        self._chat = chat

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        for _ in range((sampling.seed or 0) % 7):
            await asyncio.sleep(0)
        if sampling.allowed:
            assert (sampling.max_tokens, sampling.temperature) == (1, 0)
            logprobs = tuple(math.log(n) for n in range(1, len(sampling.allowed) + 1))
            return Generation(sampling.allowed[-1:], (0.0,), ((0, 5),), "length", allowed_logprobs=logprobs)
        ids = tuple(self._chat.turn_ids(str((sampling.seed or 0) % 10)))
        return Generation(ids, (0.0,) * len(ids), ((0, 5),), "stop")


class Ranks(Rubric):
    """The rank of an answer in its group."""

    needs_group = True

    async def judge(self, trajectory):
        raise AssertionError("asked alone")

    async def judge_group(self, trajectories):
        texts = sorted({t.messages[-1].content for t in trajectories})
        place = {text: i / max(1, len(texts) - 1) for i, text in enumerate(texts)}
        return [Verdict.scored(place[t.messages[-1].content], {"n": len(trajectories)}) for t in trajectories]


def played(chat, rubric, groups, size, at_once, fails=()):
    config = Config()
    config.rollout.max_concurrent = at_once
    task = next(CalculatorEnv().tasks("train", 0))

    class Env(CalculatorEnv):
        def reset(self, *, seed=None, options=None):
            if options["task"].id in fails:
                raise RuntimeError("broken")
            return super().reset(seed=seed, options=options)

    attempts = [
        Attempt(f"g{g}-{k}", f"g{g}", task, 1.0, 31 * g + 7 * k) for g in range(groups) for k in range(size)
    ]
    scheduler = RolloutScheduler(config, Answering(chat), chat, Env, rubric, alone=EnvironmentReward())
    found = asyncio.run(asyncio.wait_for(scheduler.run(attempts), 60))
    assert all(t.verdict is not None for t in found)
    return found


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_groups_are_judged_whole_however_few_episodes_run_at_once(chat, at_once):
    found = played(chat, Ranks(), groups=3, size=5, at_once=at_once)
    assert [t.verdict.components["n"] for t in found] == [5] * 15
    assert all(max(t.reward for t in found[i : i + 5]) == 1 for i in (0, 5, 10))


def test_an_episode_that_fails_does_not_hold_its_group(chat):
    found = played(
        chat, Ranks(), groups=1, size=3, at_once=2, fails={next(CalculatorEnv().tasks("train", 0)).id}
    )
    assert all("broken" in t.verdict.failure for t in found)


def test_an_episode_without_a_group_is_judged_by_the_environments_own_rubric(chat):
    found = played(chat, Ranks(), groups=2, size=1, at_once=2)
    assert [t.verdict.value for t in found] == [t.env_reward for t in found]


def test_the_policy_as_a_judge_tells_its_version_and_what_does_not_fit(chat):
    config = Config()
    model = EngineModel(Answering(chat), chat, config)
    assert asyncio.run(model.reply([Message("user", "Which?")], seed=3)) == "3"
    assert model.identity == "policy@5"
    with pytest.raises(JudgeError, match="does not fit"):
        asyncio.run(model.reply([Message("user", "long " * 2000)], seed=3))


def test_the_policy_is_held_to_a_choice_of_words(chat):
    model = EngineModel(Answering(chat), chat, Config())

    def reply(*words):
        return asyncio.run(model.reply([Message("user", "Which?")], seed=3, schema={"enum": list(words)}))

    assert reply("A", "tie", "B") == "B"
    assert reply("yes", "no") == "no"
    assert reply("one1", "one2") == "3"  # they begin with the same token, and it is not held

    def weights(*words):
        return asyncio.run(model.weigh([Message("user", "Which?")], words, seed=3))

    assert weights("A", "tie", "B") == pytest.approx({"A": 1 / 6, "tie": 2 / 6, "B": 3 / 6})
    with pytest.raises(JudgeError, match="begin with the same token.*: one1, one2"):
        weights("one1", "one2")
