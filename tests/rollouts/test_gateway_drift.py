"""Many episodes with tools and edits: not one sampled token may change in a later prompt."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from agents import LIMITS, TOOLS, Policy, attempt, call, client

from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.gateway.server import Gateway
from k2rl.types import Trajectory

AT_ONCE = 25
WORDS = [
    "naïve",
    "  two  spaces",
    "東京",
    "🙂",
    "x=1\n\n\ty",
    "don't",
    "3.14",
    "\\u00e9",
    "e\u0301",
    "<tool>",
]
#: As Qwen's: tools in the system message, calls written by the template, results of tools as a user's turn.
QWEN = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}# Tools\n<tools>"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>user{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module", params=["smollm2", "qwen"])
def chat(request: pytest.FixtureRequest) -> ChatTemplate:
    """SmolLM2's tokenizer, with its own template, which knows no tools, and with one like Qwen's."""
    from transformers import AutoTokenizer

    path = resolve_model("smollm2-135m")
    if request.param == "smollm2":
        return ChatTemplate.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = QWEN
    return ChatTemplate(tokenizer, [tokenizer.eos_token_id])


def turns(rng: random.Random) -> Iterator[str]:
    for _ in range(rng.randint(2, 4)):
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, 4)))
        names = rng.choices(("search", "write"), k=rng.randint(1, 2))
        yield "\n".join([text, *(call(name, query=rng.choice(WORDS)) for name in names)])
    yield "  done " + rng.choice(WORDS)


async def converse(url: str, key: str, rng: random.Random) -> int:
    """Tools until there are no more calls, and now and then what harnesses do to the history; how often."""
    messages: list[Any] = [{"role": "user", "content": "Begin."}]
    if rng.random() < 0.5:
        messages.insert(0, {"role": "system", "content": "You help."})
    edits = 0
    async with client(url, key) as model:
        while True:
            answer = await model.chat.completions.create(model="any", messages=messages, tools=TOOLS)
            message = answer.choices[0].message
            if not message.tool_calls:
                return edits
            messages.append(message.model_dump(exclude_none=rng.random() < 0.5))
            for made in messages[-1]["tool_calls"]:
                arguments = json.loads(made["function"]["arguments"])
                made["function"]["arguments"] = json.dumps(arguments, indent=1)  # the same, written otherwise
                result = "".join(rng.choices("ab \n\t<|im_end|>", k=9))
                messages.append({"role": "tool", "tool_call_id": made["id"], "content": result})
            if rng.random() < 0.1:
                edits += 1
                messages[0] = {"role": messages[0]["role"], "content": f"Begin anew, {edits}."}


def prefix_drift(trajectory: Trajectory, policy: Policy) -> int:
    """Tokens at which a prompt differs from every sequence of the episode that it could belong to."""
    lines = [line.token_ids for line in (trajectory, *trajectory.branches)]
    asked = [[*prompt, *drawn] for prompt, drawn in zip(policy.prompts, policy.drawn, strict=True)]
    return sum(min(_differing(whole, line) for line in lines) for whole in asked)


def _differing(whole: list[int], line: list[int]) -> int:
    return sum(a != b for a, b in zip(whole, line, strict=False)) + max(0, len(whole) - len(line))


@pytest.mark.parametrize("episodes", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_no_token_drifts(chat: ChatTemplate, episodes: int) -> None:
    async def episode(gateway: Gateway, number: int) -> tuple[int, int, int, int]:
        rng = random.Random(number)
        policy = Policy(chat, turns(rng), number)
        with gateway.session(attempt(number), policy, chat, LIMITS) as session:
            edits = await converse(gateway.url, session.key, rng)
            trajectory = session.trajectory()
        lines = [trajectory, *trajectory.branches]
        assert len(lines) == 1 + edits
        segments = [segment for line in lines for segment in line.segments if segment.sampled]
        sampled = [token for segment in segments for token in segment.token_ids]
        assert sorted(sampled) == sorted(token for drawn in policy.drawn for token in drawn)
        # What an endpoint that reads text and writes text would have put into the next prompt.
        again = sum(tuple(chat.turn_ids(chat.decode(drawn))) != drawn for drawn in policy.drawn)
        return prefix_drift(trajectory, policy), len(policy.drawn), again, edits

    async def all_episodes() -> list[tuple[int, int, int, int]]:
        found = []
        async with Gateway() as gateway:
            for start in range(0, episodes, AT_ONCE):
                numbers = range(start, start + AT_ONCE)
                found += await asyncio.gather(*(episode(gateway, number) for number in numbers))
        return found

    found = asyncio.run(asyncio.wait_for(all_episodes(), 600))
    drift, drawn, again, edits = (sum(column) for column in zip(*found, strict=True))
    assert drift == 0
    assert again > drawn / 2, "the policy's tokens are no test"
    assert edits
