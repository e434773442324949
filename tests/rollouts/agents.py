"""Policies and agents for tests of the gateway."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import openai

from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.rollouts.episode import Attempt, EpisodeLimits
from k2rl.types import Split, Task

LIMITS = EpisodeLimits(max_turns=50, max_tokens_per_turn=512, token_budget=1 << 20, max_model_len=1 << 20)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} something",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
    for name in ("search", "write")
]


def tasks(split: Split, seed: int) -> Iterator[Task]:
    number = 0
    while True:
        name = f"{split}-{seed}-{number}"
        yield Task(name, "agent", "default", split, number, {"question": f"What is {name}?"})
        number += 1


def attempt(number: int = 0, temperature: float = 0.7) -> Attempt:
    task = Task(f"task-{number}", "agent", "default", "train", number, {"question": "Who?"})
    return Attempt(f"episode-{number}", "group", task, temperature, number)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Policy:
    """Says given turns, in tokens that no tokenizer would choose: each text is cut at random places first."""

    def __init__(self, chat: ChatTemplate, turns: Iterable[str], seed: int = 0) -> None:
        self._chat, self._turns, self._random = chat, iter(turns), random.Random(seed)
        self.prompts: list[list[int]] = []
        self.drawn: list[tuple[int, ...]] = []
        self.samplings: list[Sampling] = []

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        self.prompts.append(list(prompt_ids))
        self.samplings.append(sampling)
        ids = tuple(self.oddly(next(self._turns)))
        cut = ids[: sampling.max_tokens]
        self.drawn.append(cut)
        logprobs = tuple(-float(len(prompt_ids) + index) for index in range(len(cut)))
        return Generation(cut, logprobs, ((0, 3),), "stop" if len(cut) == len(ids) else "length")

    def oddly(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            size = self._random.randint(1, 4)
            ids += self._chat.turn_ids(text[:size])[:-1]
            text = text[size:]
        return [*ids, self._chat.stop_token_ids[0]]


def client(url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)


async def harness(task: Task, base_url: str, api_key: str) -> float:
    """What people write: tools until the model calls none, and the whole history sent every time."""
    messages: list[Any] = [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": task.data["question"]},
    ]
    async with client(base_url, api_key) as model:
        while True:
            answer = await model.chat.completions.create(model="gpt-x", messages=messages, tools=TOOLS)
            message = answer.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                return float("42" in (message.content or ""))
            for each in message.tool_calls:
                query = json.loads(each.function.arguments).get("query", "")
                result = f"  {query!r}: nothing <|im_end|> found\n"
                messages.append({"role": "tool", "tool_call_id": each.id, "content": result})
