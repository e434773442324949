"""The chat client against a real HTTP server: what is retried, what ends an episode, what ends the run."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from envs.calculator import CalculatorEnv
from k2rl.errors import RunError
from k2rl.evaluation.chat_client import ChatModel
from k2rl.evaluation.policies import ContextFullError, Reply
from k2rl.types import Message
from tests.evaluation.chat_server import Answer, chat_server

MESSAGES = (Message("user", "2 + 3?"), Message("assistant", "calc(2 + 3)"), Message("tool", "5"))


def ask(answer: Answer) -> tuple[Reply, list[dict[str, Any]]]:
    async def turn(url: str) -> Reply:
        model = ChatModel(url, "", temperature=0.5, max_tokens=9, seed=1, first_wait_s=0.0)
        await model.connect()
        env = CalculatorEnv()
        try:
            return await model.turn(next(env.tasks("eval", 0)), MESSAGES, 1, 0, env)
        finally:
            await model.close()

    with chat_server(answer) as server:
        return asyncio.run(turn(server.url)), server.requests


def test_a_turn_is_one_request() -> None:
    reply, (request,) = ask(lambda request: "5")
    assert reply == Reply("5", 7, 10, truncated=False)
    assert request["messages"][-1] == {"role": "user", "content": "5"}
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("small", 0.5, 9)


def test_what_may_pass_is_tried_again() -> None:
    answers = iter([(503, "busy"), (429, "slow down"), "5"])
    reply, requests = ask(lambda request: next(answers))
    assert reply.text == "5"
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        ((503, "busy"), RunError, "does not answer, 5 tries: HTTP 503"),
        ((404, "no such model"), RunError, "HTTP 404: no such model"),
        ((400, '{"message": "maximum context length is 4096"}'), ContextFullError, "4096"),
        ((200, "<html>"), RunError, "no JSON"),
        ((200, '{"choices": []}'), RunError, "no chat completion"),
        ((200, '{"choices": [{"message": {"content": 5}}]}'), RunError, "no chat completion"),
    ],
)
def test_what_does_not_pass_is_named(answer: tuple[int, str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ask(lambda request: answer)
