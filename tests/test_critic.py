"""The critic in a run: pairs with a known answer, what is learned from them, and how far it is trusted."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from k2rl import launch, loop
from k2rl.config import Config, TrackingConfig
from k2rl.critic import PROBES, Critic, Pair
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.preflight import Preflight
from k2rl.run import Rollouts, Run
from k2rl.tracking.tracker import Tracker
from k2rl.training.supervised import Corpus
from k2rl.types import Message, Segment, Task, Trajectory, Verdict
from rubrics.critics.self_critique import SelfCritique
from rubrics.environment import EnvironmentReward
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
            f"{number}-{k}", f"g{number}", task, 1.0,
            [Segment((1,), False), Segment((2,), True, (-0.5,), 0)],
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
    assert metrics["critic/right_share"] == float(word == "right")
    assert metrics["critic/undecided_share"] == float(word == "never")
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


def judges_each(word):
    """A critic of one answer at a time: right is what has this word."""
    return scripted(lambda blocks, draw: {"correct": "right" if word in blocks["ANSWER"] else "wrong"})


def pointwise(word, **settings):
    return rubric_of(judges_each(word), judge="pointwise", rubrics=["correctness"], **settings)


def test_a_critic_that_judges_each_answer_is_examined_and_probed(chat):
    critic = Critic(pointwise("right"), chat, Config())
    pairs = critic.pairs(rollouts(rubric_of(prefers("right"))), seed=0)
    assert asyncio.run(critic.examine(pairs))["critic/agreement"] == 1
    # Wrong answers that say "complete" are right to it, as are right ones, which can gain nothing.
    bind_run_model(
        critic._rubric,
        scripted(
            lambda blocks, draw: {
                "correct": "right"
                if "complete" in blocks["ANSWER"] or "right" in blocks["ANSWER"]
                else "wrong"
            }
        ),
    )
    found = asyncio.run(critic.examine(pairs))
    assert found["critic/bias/self_justification"] == 0.5
    assert found["critic/bias/praise"] == found["critic/bias/padding"] == 0


@pytest.mark.parametrize("brief", [True, False])
def test_a_critic_that_judges_each_answer_is_taught_of_both(chat, brief):
    config = Config()
    config.rubric.critic_examples = 1000
    critic = Critic(pointwise("right", brief=brief), chat, config)
    pairs = critic.pairs(rollouts(rubric_of(prefers("right"))), seed=0)
    examples = critic.judgements(pairs, seed=1)
    assert len(examples) == 2 * sum(not pair.held_out for pair in pairs)
    for example in examples:
        said = chat.decode([t for t, loss in zip(example.token_ids, example.loss_mask, strict=True) if loss])
        text = chat.decode(example.token_ids)
        is_right = (
            "answer: right" in text if brief else text.split("<<<ANSWER ")[1].split("\n")[1][:5] == "right"
        )
        assert ("right" in said) == is_right


def test_of_rare_right_answers_as_much_is_taught_as_of_wrong_ones(chat):
    config = Config()
    config.rubric.critic_examples = 20
    critic = Critic(pointwise("right", brief=True), chat, config)
    verifier = rubric_of(prefers("right"))
    members = [
        t
        for n in range(16)
        for t in judged(verifier, group(n, ["no", "wrong", "never", "right"[: 9 * (n == 0)]]))
    ]
    pairs = [msgspec.structs.replace(pair, task="task-1") for pair in critic.pairs(members, seed=0)]
    assert not pairs[0].held_out
    said = [
        chat.decode([t for t, loss in zip(e.token_ids, e.loss_mask, strict=True) if loss])
        for e in critic.judgements(pairs, seed=1)
    ]
    assert (said.count("right"), said.count("wrong")) == (10, 10)
    assert critic.judgements([pair for pair in pairs if not pair.right], seed=1) == []  # a constant, else


def test_a_probability_is_taught_with_as_many_right_answers_as_there_are(chat):
    config = Config()
    config.rubric.critic_examples = 20
    critic = Critic(pointwise("right", brief=True, by_probability=True), chat, config)
    right = [Pair("task-1", "", "Which?", f"right {n}", "") for n in range(12)]
    wrong = [Pair("task-1", "", "Which?", "", f"wrong {n}") for n in range(36)]
    for examples, shares in ((20, (5, 15)), (1000, (12, 36))):
        config.rubric.critic_examples = examples
        made = critic.judgements([*right, *wrong], seed=1)
        said = [
            chat.decode([t for t, loss in zip(e.token_ids, e.loss_mask, strict=True) if loss]) for e in made
        ]
        assert (said.count("right"), said.count("wrong")) == shares
        assert len({e.token_ids for e in made}) == len(made)
    assert critic.judgements(wrong, seed=1) == []  # a constant, else


def test_who_judges_alone_rewards_as_far_as_it_is_trusted_and_the_verifier_is_no_part_of_it():
    rubric = pointwise("right", verifier_weight=0, weight=1)
    for trust, agreement in ((0, None), (0.5, 0.6), (1, 0.9)):
        rubric.believe(agreement)
        members = judged(rubric, group(0, ["not right", "wrong"]))
        assert [t.reward for t in members] == [pytest.approx(trust), 0]
        assert [t.verdict.components["critic"] for t in members] == [1, 0]
        assert [t.verdict.components["verifier"] for t in members] == [0, 0]
    assert rubric.needs_group  # so that evaluations are the verifier's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge": "pointwise", "rubrics": ["core"]}, "none of the rubrics has the criterion 'correct'"),
        ({"judge": "both"}, "must be pairwise or pointwise"),
        ({"verifier_weight": 0, "weight": 0}, "sum to 0"),
        ({"verifier_weight": -1}, "must be 0 or more"),
        ({"threshold": 0.5}, "must be above 0.5"),
    ],
)
def test_settings_of_self_critique_without_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfCritique(**settings)


def test_the_first_answers_are_judged_again_by_the_critic_of_now(chat):
    rubric = pointwise("right")
    critic = Critic(rubric, chat, Config())
    assert asyncio.run(critic.now_of_first()) == {}
    critic.keep_first(rollouts(rubric_of(prefers("right")), count=4))
    critic.keep_first(group(9, ["wrong", "wrong"]))  # of a later step
    assert asyncio.run(critic.now_of_first()) == {"critic/first_answers": 0.5}
    bind_run_model(rubric, judges_each("indeed"))
    assert asyncio.run(critic.now_of_first()) == {"critic/first_answers": 0.25}
    compares = Critic(rubric_of(prefers("right")), chat, Config())
    compares.keep_first(group(0, ["right", "wrong"]))
    assert asyncio.run(compares.now_of_first()) == {}  # its values are shares of wins within a group


def test_judgements_to_imitate_are_those_of_the_verifier_and_none_is_held_out(chat):
    config = Config()
    config.rubric.critic_examples = 5
    rubric = rubric_of(prefers("right"))
    critic = Critic(rubric, chat, config)
    pairs = critic.pairs(rollouts(rubric), seed=0)
    examples = critic.judgements(pairs, seed=1)
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
    assert critic.judgements(pairs, seed=1) == examples
    assert critic.pairs(group(0, ["right", "wrong"]), seed=0) == []  # without a verdict nothing is known
    config.rubric.critic_examples = 0
    assert critic.judgements(pairs, seed=1) == []


def test_every_taught_pair_is_shown_in_both_orders_and_dealt_out_to_the_updates(chat):
    config = Config()
    config.rubric.critic_examples, config.rubric.critic_updates = 1000, 4
    rubric = rubric_of(prefers("right"), brief=True)
    critic = Critic(rubric, chat, config)
    pairs = critic.pairs(rollouts(rubric), seed=0)
    taught = [pair.task for pair in pairs if not pair.held_out]
    shown = critic.judgements(pairs, seed=1)
    batches = critic.batches(shown, [], seed=1)
    assert len(batches) == 4
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert sorted(e.id for batch in batches for e in batch) == sorted(e.id for e in shown)
    assert sorted(example.id for example in shown) == sorted(f"critic-{task}" for task in taught * 2)
    said = [chat.decode([t for t, loss in zip(e.token_ids, e.loss_mask, strict=True) if loss]) for e in shown]
    assert said.count("A") == said.count("B") == len(taught)
    config.rubric.critic_updates = 1000  # more than there are judgements
    assert [len(batch) for batch in critic.batches(shown, [], seed=1)] == [1] * len(shown)
    assert critic.batches([], rollouts(rubric), seed=1) == []


def test_the_policys_own_responses_that_are_no_worse_than_their_group_are_imitated_beside_judgements(chat):
    config = Config()
    config.rubric.critic_updates, config.rubric.critic_replay = 2, 2
    rubric = rubric_of(prefers("right"))
    critic = Critic(rubric, chat, config)
    members = rollouts(rubric)
    members[0].verdict = Verdict.failed("lost")
    config.rubric.critic_examples = 6
    judgements = critic.judgements(critic.pairs(members, seed=0), seed=1)
    for batch in critic.batches(judgements, members, seed=1):
        own = [text for text in batch if text not in judgements]
        assert (len(batch), len(own)) == (9, 6)
        assert {text.loss_mask for text in own} == {(False, True)}
        assert members[0].id not in {text.id for text in own}
    config.rubric.critic_replay = 1000
    replayed = {text.id for batch in critic.batches(judgements, members, seed=1) for text in batch}
    # All that are right, and none that is wrong: imitating both would take back the policy's own update.
    assert {m.id for m in members if m.id in replayed} == {m.id for m in members[1:] if m.env_reward == 1}
    equal = judged(rubric, group(99, ["wrong", "no"]))
    assert {m.id for m in equal} <= {t.id for b in critic.batches(judgements, equal, seed=1) for t in b}


def test_judgements_before_the_run_teach_their_form_and_nothing_of_what_is_right(chat):
    rubric = rubric_of(prefers("right"), brief=True)
    critic = Critic(rubric, chat, Config())
    members = rollouts(rubric)
    drawn = critic.drawn(members, 300, seed=0)
    assert drawn == critic.drawn(members, 300, seed=0) != critic.drawn(members, 300, seed=1)
    said = [chat.decode([t for t, loss in zip(e.token_ids, e.loss_mask, strict=True) if loss]) for e in drawn]
    right = [
        "A" if "A: right" in text and "B: right" not in text else "B" if "B: right" in text else None
        for text in (chat.decode(e.token_ids) for e in drawn)
        if ("A: right" in text) != ("B: right" in text)
    ]
    for word in ("A", "tie", "B"):
        assert 70 < said.count(word) < 130
    verdicts = [
        s
        for s, e in zip(said, drawn, strict=True)
        if ("A: right" in chat.decode(e.token_ids)) != ("B: right" in chat.decode(e.token_ids))
    ]
    agreeing = sum(map(str.__eq__, verdicts, right))
    assert len(right) > 100
    assert 0.2 < agreeing / len(right) < 0.47
    assert critic.drawn(group(0, ["no", "no"]), 3, seed=0) == []


def test_failed_episodes_are_in_no_pair(chat):
    rubric = rubric_of(prefers("right"))
    members = judged(rubric, group(0, ["right", "wrong"]))
    members[1].verdict = Verdict.failed("lost")
    assert Critic(rubric, chat, Config()).pairs(members, seed=0) == []


def test_what_is_known_of_the_critic_survives_a_resumption(chat, tmp_path):
    rubric = rubric_of(prefers("right"))
    config = Config(tracking=TrackingConfig(live="off", tensorboard=False))
    prepared = Preflight(config, tmp_path, chat, None, rubric, [], [], [])
    with Tracker(tmp_path, config.tracking, 4) as tracker:
        for step, agreement in ((1, 0.55), (2, 0.6), (4, 1.0)):
            tracker.step(step, {"critic/agreement_smoothed": agreement})
        tracker.step(3, {"reward/mean": 1.0})  # no held-out pair in it
    rubric.believe(1.0)  # as it is where workers died and are started again
    with Tracker(tmp_path, config.tracking, 4, resume_step=3):
        critic = launch._critic(prepared, tmp_path)
    assert critic.agreement == 0.6
    assert rubric.trust == pytest.approx(0.5)
    assert critic.standing == "doubted"
    fresh = launch._critic(prepared, tmp_path / "new")
    assert (fresh.agreement, rubric.trust, fresh.standing) == (None, 0, "unexamined")
    prepared.rubric = EnvironmentReward()
    assert launch._critic(prepared, tmp_path) is None


class Recorder:
    """A worker and tracker that write down what they are asked for."""

    def __init__(self):
        self.calls, self.notes = [], []

    async def policy_step(self, groups, *rest):
        self.calls.append(("policy", len(groups)))
        return {"loss": 1.0}

    async def sft_step(self, batch, lr):
        assert lr == Config().optimizer.lr
        self.calls.append(("imitated", len(batch)))
        return {"loss": float(len(batch))}

    async def publish(self):
        self.calls.append(("published", 0))
        return {}


@pytest.mark.parametrize("ptx_weight", [0.0, 0.1])
def test_the_critic_learns_after_the_policy_whatever_ptx_weighs(chat, tmp_path, ptx_weight):
    config = Config()
    config.ptx.weight = ptx_weight
    config.rubric.critic_examples, config.rubric.critic_updates = 6, 2
    config.rubric.critic_replay = 0
    rubric = rubric_of(prefers("right"))
    worker, tracking = Recorder(), TrackingConfig(live="off", tensorboard=False)
    prepared = Preflight(config, tmp_path, chat, None, rubric, [], [], [])
    with Tracker(tmp_path, tracking, 1) as tracker:
        run = Run(
            config, tmp_path, tracker, worker, prepared, None, None, Corpus([], 0, 0),
            critic=Critic(rubric, chat, config),
        )  # fmt: skip
        metrics = asyncio.run(loop._learned(run, 1, Rollouts(rollouts(rubric), 0)))
    assert worker.calls == [("policy", 16), ("imitated", 3), ("imitated", 3), ("published", 0)]
    assert metrics["critic/loss"] == 3
    assert metrics["critic/examples"] == 6


def test_a_critic_that_loses_or_regains_its_weight_is_said_once(chat, tmp_path):
    config = Config()
    rubric = rubric_of(prefers("right"))
    critic = Critic(rubric, chat, config)
    members = [t for n in range(16) for t in judged(rubric, group(n, ["right", "wrong"]))]
    tracking = TrackingConfig(live="off", tensorboard=False)
    prepared = Preflight(config, tmp_path, chat, None, rubric, [], [], [])
    with Tracker(tmp_path, tracking, 9) as tracker:
        run = Run(config, tmp_path, tracker, None, prepared, None, None, None, critic=critic)
        for step, word in enumerate(("right", "right", "wrong", "wrong", "right", "right", "right"), 1):
            bind_run_model(rubric, prefers(word))
            asyncio.run(loop._critic(run, step, members))
    notes = [json.loads(line)["text"] for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert [note.split(":")[0] for note in notes] == ["step 1", "step 3", "step 6"]
    assert "on 50% of held-out pairs; its reward counts for 0% of its weight" in notes[1]
