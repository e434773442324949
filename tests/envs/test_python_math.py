"""Python-tool math: answers against programs that run in a real sandbox, and what programs may do there."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

import envs
from envs.coding.judging import close_judges
from envs.tools import calling
from envs.tools.formats import written
from k2rl.types import Message
from tests.envs.conftest import Episode, play_async


def played(turns: list[str | Message], place: int = 0) -> Episode:
    async def play() -> Episode:
        env = envs.make("python_math")
        task = next(islice(env.tasks("train", 0), place, None))
        try:
            return await play_async(env, task, [written(turn) for turn in turns])
        finally:
            await envs.maybe_await(env.close())
            await close_judges()

    return asyncio.run(play())


def test_programs_and_formulas_agree() -> None:
    async def run() -> None:
        env = envs.make("python_math")
        for task in islice(env.tasks("eval", 4), 2 * len(env.kinds)):
            look, say = env.demonstration(task) or ()
            episode: Any = await play_async(env, task, [written(look), written(say)])
            assert episode.messages[-1].content == str(task.data["answer"])
            assert episode.reward == 1.0
        await envs.maybe_await(env.close())
        await close_judges()

    asyncio.run(run())


def test_what_programs_do_is_shown() -> None:
    turns = [
        calling("python", 0, code="print(1 / 0)"),
        calling("python", 1, code="open('x', 'w').write('kept'); print(open('x').read())"),
        calling("python", 2, code="print(open('x').read() * 5000)"),
        calling("python", 3, code="pass"),
        calling("python", 4, program="pass"),
        calling("python", 5, code="print(open('/etc/shadow').read())"),
        "The answer is 0.",
    ]
    episode = played(turns)
    said = [message.content for message in episode.messages[2:]]
    assert "ZeroDivisionError" in said[0]
    assert said[0].endswith("[exit code 1]")
    assert said[1] == "kept"
    assert "characters left out" in said[2]
    assert said[3] == "[exit code 0]"
    assert said[4].startswith("error: code: Field required")
    assert "Error" in said[5]
    assert episode.components == {"calls": 6.0, "bad_calls": 1.0, "answer_correct": 0.0}
