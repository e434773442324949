"""Episodes token by token, against a scripted policy and the tiny model's tokenizer."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

import pytest

from envs.base import TextEnv
from envs.calculator import CalculatorEnv
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import Attempt, Episode, EpisodeLimits, run_episode
from k2rl.types import Message, Task, Trajectory

LIMITS = EpisodeLimits(max_turns=4, max_tokens_per_turn=64, token_budget=256, max_model_len=2048)


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


class FakePolicy:
    """Says given turns; each token's log-prob is its position in the whole episode, negated."""

    def __init__(self, chat: ChatTemplate, turns: list[str], version_change_at: int | None = None) -> None:
        self._chat, self._turns, self._split = chat, iter(turns), version_change_at
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        ids = self._chat.turn_ids(next(self._turns))
        cut = ids[: sampling.max_tokens]
        logprobs = tuple(-float(len(prompt_ids) + index) for index in range(len(cut)))
        spans = ((0, 7),) if self._split is None else ((0, 7), (self._split, 8))
        reason = "stop" if len(cut) == len(ids) else "length"
        # Each request computes all positions before its last token, and tells of it.
        computed = range(len(prompt_ids) + len(cut) - 1)
        routes = tuple(f"{len(self.prompts)}/{position}".encode() for position in computed)
        return Generation(tuple(cut), logprobs, spans, reason, routes)


def play(env: TextEnv, policy: FakePolicy, chat: ChatTemplate, limits: EpisodeLimits = LIMITS) -> Trajectory:
    task = next(iter(islice(CalculatorEnv().tasks("train", 3), 1)))
    attempt = Attempt("episode", "group", task, temperature=1.2, seed=5)
    return asyncio.run(run_episode(Episode(attempt), env, policy, chat, limits))


def test_each_prompt_is_exactly_the_ids_so_far(chat: ChatTemplate) -> None:
    env = CalculatorEnv()
    policy = FakePolicy(chat, ["calc(1 + 2)", "The answer is 3."])
    trajectory = play(env, policy, chat)
    assert trajectory.stop_reason == "env_done"
    assert len(policy.prompts) == 2
    ids, mask = trajectory.token_ids, trajectory.sampled_mask
    first_turn = chat.turn_ids("calc(1 + 2)")
    assert ids[: len(policy.prompts[0])] == policy.prompts[0]
    assert policy.prompts[1][: len(policy.prompts[0]) + len(first_turn)] == policy.prompts[0] + first_turn
    assert ids[: len(policy.prompts[1])] == policy.prompts[1]
    assert [i for i, sampled in zip(ids, mask, strict=True) if sampled] == first_turn + chat.turn_ids(
        "The answer is 3."
    )


def test_behaviour_logprobs_stay_with_their_tokens(chat: ChatTemplate) -> None:
    trajectory = play(CalculatorEnv(), FakePolicy(chat, ["calc(1 + 2)", "3"]), chat)
    positions = [index for index, sampled in enumerate(trajectory.sampled_mask) if sampled]
    assert trajectory.behaviour_logprobs == [-float(position) for position in positions]


def test_a_position_keeps_the_experts_that_computed_it_first(chat: ChatTemplate) -> None:
    policy = FakePolicy(chat, ["calc(1 + 2)", "3"])
    trajectory = play(CalculatorEnv(), policy, chat)
    first = len(policy.prompts[0]) + len(chat.turn_ids("calc(1 + 2)")) - 1
    turns = [1] * first + [2] * (len(trajectory.token_ids) - 1 - first)
    assert trajectory.routes == [f"{turn}/{position}".encode() for position, turn in enumerate(turns)]


def test_what_was_sampled_before_an_interruption_keeps_its_experts() -> None:
    start = Generation((5, 6), (0.0, 0.0), ((0, 1),), "interrupted", (b"a", b"b", b"c"))
    rest = Generation((7,), (0.0,), ((0, 2),), "stop", (b"x", b"y", b"z", b"w"))
    assert start.followed_by(rest).routes == (b"a", b"b", b"c", b"w")


def test_rendered_conversation_is_what_the_template_renders(chat: ChatTemplate) -> None:
    """Appending ids gives the same text as rendering all messages at once."""
    trajectory = play(CalculatorEnv(), FakePolicy(chat, ["calc(1 + 2)", "3"]), chat)
    tokenizer = chat._tokenizer
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in trajectory.messages], tokenize=False
    )
    assert tokenizer.decode(trajectory.token_ids) == whole.rstrip("\n")


def test_a_turn_across_a_weight_update_has_two_segments(chat: ChatTemplate) -> None:
    trajectory = play(CalculatorEnv(), FakePolicy(chat, ["The answer is 3."], version_change_at=4), chat)
    sampled = [segment for segment in trajectory.segments if segment.sampled]
    assert (sampled[0].weight_version, len(sampled[0].token_ids)) == (7, 4)
    assert sampled[1].weight_version == 8
    assert sum(len(s.token_ids) for s in sampled) == len(chat.turn_ids("The answer is 3."))


def test_the_budget_truncates_the_whole_episode(chat: ChatTemplate) -> None:
    first = len(chat.turn_ids("calc(1 + 2)"))
    limits = EpisodeLimits(max_turns=4, max_tokens_per_turn=64, token_budget=first + 2, max_model_len=2048)
    policy = FakePolicy(chat, ["calc(1 + 2)", "The answer is 3."])
    trajectory = play(CalculatorEnv(), policy, chat, limits)
    assert trajectory.stop_reason == "token_budget"
    assert trajectory.num_sampled == first + 2
    assert policy.samplings[1].max_tokens == 2


def test_a_tool_result_that_fills_the_context_is_not_the_budgets_business(chat: ChatTemplate) -> None:
    prompt = len(play(CalculatorEnv(), FakePolicy(chat, ["3"]), chat).segments[0].token_ids)
    first = len(chat.turn_ids("calc(1 + 2)"))
    limits = EpisodeLimits(4, 64, token_budget=256, max_model_len=prompt + first + 2)
    trajectory = play(CalculatorEnv(), FakePolicy(chat, ["calc(1 + 2)", "3"]), chat, limits)
    assert trajectory.stop_reason == "context"
    assert trajectory.num_sampled == first


def test_a_turn_cut_by_the_context_is_told_from_one_cut_by_the_budget(chat: ChatTemplate) -> None:
    whole = play(CalculatorEnv(), FakePolicy(chat, ["calc(1 + 2)", "The answer is 3."]), chat)
    before_last = sum(len(segment.token_ids) for segment in whole.segments[:-1])
    limits = EpisodeLimits(4, 64, token_budget=256, max_model_len=before_last + 2)
    policy = FakePolicy(chat, ["calc(1 + 2)", "The answer is 3."])
    assert play(CalculatorEnv(), policy, chat, limits).stop_reason == "context"
    assert policy.samplings[1].max_tokens == 2


def test_a_prompt_that_does_not_fit_is_an_error_and_not_an_episode(chat: ChatTemplate) -> None:
    limits = EpisodeLimits(4, 64, token_budget=256, max_model_len=20)
    policy = FakePolicy(chat, ["3"])
    with pytest.raises(ValueError, match="does not fit inference.max_model_len=20"):
        play(CalculatorEnv(), policy, chat, limits)
    assert not policy.prompts


def test_a_cut_turn_is_closed_before_the_next_message(chat: ChatTemplate) -> None:
    limits = EpisodeLimits(max_turns=4, max_tokens_per_turn=11, token_budget=64, max_model_len=2048)
    policy = FakePolicy(chat, ["calc(1 + 2) and then some more", "3"])
    trajectory = play(CalculatorEnv(), policy, chat, limits)
    cut, after = trajectory.segments[1], trajectory.segments[2]
    assert cut.sampled
    assert len(cut.token_ids) == 11
    assert not after.sampled
    assert after.token_ids[0] == chat.stop_token_ids[0]


def test_turns_are_seeded_apart(chat: ChatTemplate) -> None:
    policy = FakePolicy(chat, ["calc(1 + 2)", "3"])
    play(CalculatorEnv(), policy, chat)
    assert policy.samplings[0].seed != policy.samplings[1].seed


def test_max_turns(chat: ChatTemplate) -> None:
    limits = EpisodeLimits(max_turns=1, max_tokens_per_turn=64, token_budget=64, max_model_len=2048)
    assert play(CalculatorEnv(), FakePolicy(chat, ["calc(1 + 2)"]), chat, limits).stop_reason == "max_turns"


class AsyncEcho(TextEnv):
    """Asynchronous, with components to be summed."""

    def tasks(self, split: Any, seed: int) -> Any:
        yield Task("t", "echo", "default", split, 0)

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self._turns = 0
        return (Message("user", "hello"),), {}

    async def step(self, action: str) -> Any:
        await asyncio.sleep(0)
        self._turns += 1
        return (Message("user", action),), 0.5, self._turns == 2, False, {"reward_components": {"turns": 1.0}}


def test_asynchronous_environments_and_reward_sums(chat: ChatTemplate) -> None:
    trajectory = play(AsyncEcho(), FakePolicy(chat, ["a", "b"]), chat)
    assert trajectory.env_reward == 1.0
    assert trajectory.reward_components == {"turns": 2.0}
    assert [m.content for m in trajectory.messages] == ["hello", "a", "a", "b", "b"]
