"""Customer service: the rules, the scripted member, and one that a model plays over HTTP."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

import msgspec
import pytest

import envs
from envs.base import maybe_await
from envs.customer_service.cases import CASES, Case
from envs.customer_service.library import MAX_HOLDS, MAX_OWED_CENTS, MAX_RENEWALS, MAX_WAIVED_CENTS, Member
from envs.customer_service.users import DONE, ScriptedUser
from envs.tools import calling
from envs.tools.formats import written
from k2rl.errors import ConfigError
from k2rl.types import Task
from tests.envs.conftest import play_async
from tests.evaluation.chat_server import chat_server


def cases(number: int = 33) -> list[tuple[Task, Case]]:
    tasks = islice(envs.make("customer_service").tasks("train", 2), number)
    return [(task, msgspec.convert(task.data["case"], Case)) for task in tasks]


def allowed(case: Case, name: str, arguments: dict[str, str]) -> bool:
    """The policy, spelled out once more: may the clerk do this in the library as it is?"""
    library, me = case.library, case.library.members[case.member]
    if name == "renew_loan":
        loan = next(loan for loan in me.loans if loan.id == arguments["loan_id"])
        return loan.renewals < MAX_RENEWALS and not set(library.holders(loan.title)) - {me.id}
    if name == "place_hold":
        room = len(me.holds) < MAX_HOLDS or any(action == "cancel_hold" for action, _ in case.actions)
        return room and me.owed <= MAX_OWED_CENTS and not library.titles[arguments["title_id"]].free_copies
    if name == "waive_fee":
        fee = next(fee for fee in me.fees if fee.id == arguments["fee_id"])
        return fee.cents <= MAX_WAIVED_CENTS and not me.waived_this_year
    return name in ("cancel_hold", "hand_over")


#: What the member asks for in the cases whose actions the rules forbid.
ASKED = {
    "renew_used_up": lambda me, case: [
        ("renew_loan", {"loan_id": loan.id})
        for loan in me.loans
        if case.library.titles[loan.title].name in case.wish
    ],
    "hold_owing": lambda me, case: [
        ("place_hold", {"title_id": title.id})
        for title in case.library.titles.values()
        if title.name in case.details
    ],
    "waive_again": lambda me, case: [("waive_fee", {"fee_id": me.fees[0].id})],
}
ASKED |= {
    "renew_wanted": ASKED["renew_used_up"],
    "hold_free": ASKED["hold_owing"],
    "waive_large": ASKED["waive_again"],
}


def test_what_is_right_is_what_the_rules_say() -> None:
    for task, case in cases():
        me: Member = case.library.members[case.member]
        if task.kind in ASKED:
            (asked,) = ASKED[task.kind](me, case)
            assert not case.actions
            assert case.told
            assert not allowed(case, *asked)
        else:
            assert case.actions
            assert all(allowed(case, name, arguments) for name, arguments in case.actions)
    assert {task.kind for task, _ in cases()} == set(CASES)


def test_a_good_clerk_earns_1_and_others_0(play: Any) -> None:
    env = envs.make("customer_service")
    for task, case in cases(11):
        me = case.library.members[case.member]
        turns = list(env.demonstration(task) or [])
        good = play(env, task, [written(turn) for turn in turns])
        assert good.done
        assert good.reward == 1.0
        assert good.components["bad_calls"] == 0.0
        # Who says that it is done and does nothing.
        idle = play(env, task, [turns[0], "That is done. Have a good day."])  # type: ignore[list-item]
        assert idle.done
        assert idle.reward == 0.0
        # Who does something nobody asked for, too.
        meddling = [*turns[:-1], calling("waive_fee", 9, member_id=me.id, fee_id=me.fees[-1].id)]
        if task.kind != "waive":
            assert play(env, task, [written(turn) for turn in [*meddling, turns[-1]]]).reward == 0.0


def test_the_member_says_who_they_are_when_asked_and_then_leaves() -> None:
    _, case = cases(1)[0]
    user = ScriptedUser(case)
    assert case.wish in user.opening()
    assert "born on" in (user.reply("May I have your name?") or "")
    assert user.reply("Which one do you mean?") == case.details
    assert user.reply("It is done.") is None
    for words in (["?"] * 9, ["no"] * 9):
        user = ScriptedUser(case)
        replies = [user.reply(word) for word in words]
        assert None in replies[:4]


def test_a_clerk_who_only_talks_loses(play: Any) -> None:
    env = envs.make("customer_service", max_words=2)
    task, _ = cases(1)[0]
    episode = play(env, task, ["What is your name?", "Which one?", "Really?"])
    assert episode.done
    assert episode.reward == 0.0


def test_bad_calls_are_answered(play: Any) -> None:
    env = envs.make("customer_service")
    task, case = cases(1)[0]
    calls = [
        calling("find_member", 0, name="Nobody", born="2000-01-01"),
        calling("show_member", 1, member_id="M0"),
        calling("renew_loan", 2, member_id=case.member, loan_id="L0"),
        calling("place_hold", 3, member_id=case.member, title_id="T0"),
        calling("cancel_hold", 4, member_id=case.member, title_id="T0"),
        calling("waive_fee", 5, member_id=case.member, fee_id="F0"),
    ]
    episode = play(env, task, [written(call) for call in calls])
    assert episode.components == {"calls": 6.0, "bad_calls": 6.0}
    assert all(message.content.startswith("error: ") for message in episode.messages[2:])


def test_a_member_played_by_a_model() -> None:
    task, case = cases(1)[0]
    env = envs.make("customer_service")
    turns = [written(turn) for turn in env.demonstration(task) or []]
    said = iter(["I want something.", "It is me.", f"{DONE}"])

    async def played(url: str) -> Any:
        env = envs.make("customer_service", user=url, user_model="small")
        try:
            assert env.snapshot() is None
            return await play_async(env, task, turns)
        finally:
            await maybe_await(env.close())

    with chat_server(lambda request: next(said)) as server:
        episode = asyncio.run(played(server.url))
    assert episode.done
    assert episode.reward == 1.0
    assert [m.content for m in episode.messages if m.role == "user"] == ["I want something.", "It is me."]
    first = server.requests[0]
    assert first["model"] == "small"
    assert case.wish in first["messages"][0]["content"]
    assert [m["role"] for m in server.requests[-1]["messages"]][-1] == "user"
    with chat_server(lambda request: (500, "down")) as broken, pytest.raises(Exception, match="500"):
        asyncio.run(played(broken.url))


def test_a_user_that_is_none() -> None:
    with pytest.raises(ConfigError, match="user='me' is neither"):
        envs.make("customer_service", user="me")
    with pytest.raises(ConfigError, match="needs user_model=NAME"):
        envs.make("customer_service", user="http://127.0.0.1:1/v1")
