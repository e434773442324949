"""The critic in a run: pairs with a known answer, what is learned from them, and how far it is trusted."""

from __future__ import annotations

import asyncio

import pytest

from k2rl.config import Config
from k2rl.critic import PROBES, Critic
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.types import Message, Segment, Task, Trajectory, Verdict
from rubrics.critics.self_critique import SelfCritique
from rubrics.groups import judge_group_safely
from rubrics.models import bind_run_model
from tests.rubrics.critics import critic as scripted


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


def group(number, answers):
    """Responses to a task, of which `right…` is right."""
    task = Task(f"task-{number}", "e", "k", "train", 0)
    return [
        Trajectory(
            f"{number}-{k}", f"g{number}", task, 1.0, [Segment((1,), False)],
            [Message("user", "Which is it?"), Message("assistant", answer)],
            env_reward=float(answer.startswith("right")),
        )
        for k, answer in enumerate(answers)
    ]  # fmt: skip


def prefers(word):
    """A critic that prefers answers with this word, and calls the rest a tie."""

    def decide(blocks, draw):
        a, b = word in blocks["ANSWER A"], word in blocks["ANSWER B"]
        return {"winner": "tie" if a == b else "A" if a else "B"}

    return scripted(decide)


def rubric_of(model, **settings):
    rubric = SelfCritique(**settings)
    assert bind_run_model(rubric, model)
    return rubric


def judged(rubric, members):
    for member, verdict in zip(members, asyncio.run(judge_group_safely(rubric, members, 60)), strict=True):
        member.verdict = verdict
    return members


def rollouts(rubric, count=16):
    return [
        t for n in range(count) for t in judged(rubric, group(n, ["right", "wrong", "right indeed", "no"]))
    ]


def test_nobody_is_trusted_unexamined_and_then_by_agreement():
    model = prefers("right")
    rubric = rubric_of(model)
    assert [t.reward for t in judged(rubric, group(0, ["right", "wrong"]))] == [1, 0]
    assert model.usage.requests == 0
    assert [rubric.believe(a) for a in (None, 0.4, 0.5, 0.6, 0.7, 1.0)] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    members = judged(rubric, group(0, ["right", "wrong", "no"]))
    assert [t.reward for t in members] == pytest.approx([1, 0.125 / 1.5, 0.125 / 1.5])
    assert members[0].verdict.weights == pytest.approx({"verifier": 2 / 3, "critic": 1 / 3})
    assert members[0].verdict.judge == "scripted"


@pytest.mark.parametrize(
    ("word", "agreement", "trust"), [("right", 1, 1), ("never", 0.5, 0), ("wrong", 0, 0)]
)
def test_agreement_with_the_verifier_on_held_out_pairs(chat, word, agreement, trust):
    rubric = rubric_of(prefers(word))
    critic = Critic(rubric, chat, Config())
    trajectories = [t for n in range(16) for t in judged(rubric, group(n, ["right", "wrong"]))]
    pairs = critic.pairs(trajectories, seed=0)
    assert 0 < sum(pair.held_out for pair in pairs) < len(pairs) == 16
    metrics = asyncio.run(critic.examine(pairs))
    assert metrics["critic/agreement"] == agreement
    assert metrics["critic/trust"] == rubric.trust == trust
    assert metrics["critic/failed_share"] == 0
    assert {metrics[f"critic/bias/{name}"] for name in PROBES} == {0}


def test_agreement_is_smoothed_and_replies_that_are_none_agree_with_nobody(chat):
    rubric = rubric_of(prefers("right"))
    critic = Critic(rubric, chat, Config())
    pairs = critic.pairs(rollouts(rubric), seed=0)
    asyncio.run(critic.examine(pairs))
    bind_run_model(rubric, scripted(lambda blocks, draw: {"winner": "neither"}))
    metrics = asyncio.run(critic.examine(pairs))
    assert metrics["critic/failed_share"] == 1
    assert metrics["critic/agreement"] == 0
    assert metrics["critic/agreement_smoothed"] == 0.5
    assert rubric.trust == 0


def test_biases_are_seen(chat):
    rubric = rubric_of(prefers("great"))
    critic = Critic(rubric, chat, Config())
    metrics = asyncio.run(critic.examine(critic.pairs(rollouts(rubric), seed=0)))
    assert metrics["critic/bias/praise"] == 0.5
    assert metrics["critic/bias/padding"] == metrics["critic/bias/self_justification"] == 0


def test_judgements_to_imitate_are_those_of_the_verifier_and_none_is_held_out(chat):
    config = Config()
    config.rubric.critic_examples = 5
    rubric = rubric_of(prefers("right"))
    critic = Critic(rubric, chat, config)
    pairs = critic.pairs(rollouts(rubric), seed=0)
    examples = critic.examples(pairs, seed=1)
    assert len(examples) == 5
    held_out = {pair.task for pair in pairs if pair.held_out}
    assert not {example.id.removeprefix("critic-") for example in examples} & held_out
    winners = set()
    for example in examples:
        text = chat.decode(example.token_ids)
        said = chat.decode([t for t, loss in zip(example.token_ids, example.loss_mask, strict=True) if loss])
        winner = said.rsplit('"', 2)[1]
        block = text.split(f"<<<ANSWER {winner} ")[1].split("\n")[1]
        assert block.startswith("right")
        winners.add(winner)
    assert winners == {"A", "B"}
    assert critic.examples(pairs, seed=1) == examples
    assert critic.pairs(group(0, ["right", "wrong"]), seed=0) == []  # without a verdict nothing is known
    config.rubric.critic_examples = 0
    assert critic.examples(pairs, seed=1) == []


def test_failed_episodes_are_in_no_pair(chat):
    rubric = rubric_of(prefers("right"))
    members = judged(rubric, group(0, ["right", "wrong"]))
    members[1].verdict = Verdict.failed("lost")
    assert Critic(rubric, chat, Config()).pairs(members, seed=0) == []
