"""Ten thousand episodes at once in one process: what the driver spends on a turn, and whether any gets lost.

The policy is a script that answers after a lognormal delay, as a busy engine does; the environments are real
code of four turns, half of them `async def` with a lognormal delay, half of them plain functions that block
for some milliseconds. Everything else is the product: pool, gate, seats, deadlines, chat template, judges and
the store (a file). All of the process's CPU time is counted, the tokenizer's and the environments' included;
the same turns played one after the other, without any of the scheduling, are measured beside it.

    make bench-episodes                     10,000 episodes
    make bench-episodes ARGS="--episodes 1000"
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from envs.base import TextEnv
from k2rl.config import Config
from k2rl.inference.engine import Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.episode import Attempt, Episode
from k2rl.rollouts.pool import Pool
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.rollouts.store.sqlite import SQLiteStore
from k2rl.types import Message, Split, Task

GROUP, TURNS = 8, 4


class Waiting(TextEnv):
    """Four turns; an answer takes a while."""

    kinds = ("async", "plain")
    slow = True

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        number = 0
        while True:
            yield Task(f"t{number}", "waiting", self.kinds[number % 2], split, number)
            number += 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.task = self.start_episode(seed, options)
        self.turn, self.delays = 0, random.Random(self.task.seed)
        return (Message("user", f"Task {self.task.id}: look four things up."),), {}

    def step(self, action: str) -> Any:
        if self.slow and self.task.kind == "async":
            return self._later()
        if self.slow:
            time.sleep(0.005)
        return self._answer()

    async def _later(self) -> Any:
        await asyncio.sleep(self.delays.lognormvariate(-0.5, 1))
        return self._answer()

    def _answer(self) -> Any:
        self.turn += 1
        return (Message("tool", f"Result {self.turn}."),), 0.25, self.turn == TURNS, False, {}


class Script:
    """Answers after a lognormal delay, of 0.6 s in the median."""

    def __init__(self, chat: ChatTemplate, slow: bool) -> None:
        self._ids = tuple(chat.turn_ids("Look it up, please."))
        self._slow = slow
        self._delays = random.Random(0)
        self.turns = self.open = self.most_open = 0

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        self.turns += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        if self._slow:
            await asyncio.sleep(self._delays.lognormvariate(-0.5, 1))
        self.open -= 1
        return Generation(self._ids, (-1.0,) * len(self._ids), ((0, 0),), "stop")

    async def interrupt(self) -> None:
        raise AssertionError("nothing is unfinished")


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def configured(episodes: int) -> Config:
    config = Config()
    config.rollout.tasks_per_step, config.rollout.group_size = episodes // GROUP, GROUP
    config.rollout.max_concurrent = episodes
    config.inference.max_num_seqs = 8192
    config.inference.max_model_len = 4096
    config.budget.default = 2048
    config.env.max_turns = TURNS
    return config


async def together(
    config: Config, chat: ChatTemplate, folder: Path
) -> tuple[float, float, Script, list[str]]:
    engine = Script(chat, slow=True)
    scheduler = RolloutScheduler(config, engine, chat, Waiting, Waiting().rubric)

    async def draw(step: int, number: int) -> list[Task]:
        return list(islice(Waiting().tasks("train", 0), config.rollout.tasks_per_step))

    pool = Pool(config, scheduler, engine, SQLiteStore(folder / "episodes.sqlite3"), draw)
    await pool.begin("source")
    began, used = time.monotonic(), cpu()
    harvest = await pool.play(1, 1.0, 0, lambda done, total: None)
    pool.settle(harvest.trajectories)
    seconds, spent = time.monotonic() - began, cpu() - used
    assert not any(t.failed or t.reward != 1.0 for t in harvest.trajectories)
    await pool.close()
    return seconds, spent, engine, [t.id for t in harvest.trajectories]


async def one_by_one(config: Config, chat: ChatTemplate, count: int) -> float:
    """CPU seconds a turn without any waiting or concurrency."""
    Waiting.slow = False
    engine = Script(chat, slow=False)
    scheduler = RolloutScheduler(config, engine, chat, Waiting, Waiting().rubric)
    used = cpu()
    for number, task in enumerate(islice(Waiting().tasks("train", 0), count)):
        await scheduler.play(Episode(Attempt(f"a{number}", "g", task, 1.0, number)), engine)
    return (cpu() - used) / engine.turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    episodes = parser.parse_args().episodes // GROUP * GROUP
    chat, config = ChatTemplate.from_pretrained(resolve_model("tiny-qwen3")), configured(episodes)
    before = psutil.Process().memory_info().rss / 2**30
    with tempfile.TemporaryDirectory() as folder:
        seconds, spent, engine, ids = asyncio.run(together(config, chat, Path(folder)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    alone = asyncio.run(one_by_one(config, chat, 200))
    print(f"{len(ids)} of {episodes} episodes over, {len(ids) - len(set(ids))} of them double")
    print(
        f"{engine.turns} turns in {seconds:.1f} s; up to {engine.most_open} requests with the policy at once"
    )
    print(f"memory: {peak:.2f} GiB at most, {before:.2f} GiB before")
    print(
        f"CPU: {1e3 * spent / engine.turns:.3f} ms a turn in all; the same turns alone {1e3 * alone:.3f} ms"
    )


if __name__ == "__main__":
    main()
