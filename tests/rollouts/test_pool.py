"""Groups across steps: who is parked, dropped, taken, waited for and taken up again; no vLLM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from envs.base import TextEnv
from k2rl.config import Config
from k2rl.inference.engine import EngineDeadError, Generation, Sampling
from k2rl.models.chat import ChatTemplate
from k2rl.models.hub import resolve_model
from k2rl.rollouts.pool import Harvest, Pool
from k2rl.rollouts.scheduler import RolloutScheduler
from k2rl.rollouts.store.sqlite import SQLiteStore
from k2rl.types import Message, Split, Task, Trajectory, Verdict
from rubrics.base import Rubric


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.from_pretrained(resolve_model("tiny-qwen3"))


class Letters(TextEnv):
    """Tasks `t0`, `t1`, … of one turn; the kind says how long the engine takes for a response."""

    kinds = ("short", "long")

    def tasks(self, split: Split, seed: int) -> Iterator[Task]:
        for number in range(10**6):
            yield Task(f"t{number}", "letters", "short", split, number)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.task = self.start_episode(seed, options)
        return (Message("user", f"{self.task.id} {self.task.kind}"),), {}

    def step(self, action: str) -> Any:
        return (), float(len(action) % 2), True, False, {}


class Engine:
    """Says two tokens: all there is of a short turn, and of a long one what a version of the weights says.

    The last of a turn's is a stop token; a long turn has `versions` pairs.
    """

    def __init__(self, chat: ChatTemplate, versions: int = 2) -> None:
        self._chat, self._versions = chat, versions
        self.version = 0
        self.requests: list[tuple[str, Sampling]] = []
        self._interrupted = asyncio.Event()
        (self._letter,) = chat.turn_ids("a")[:-1]
        self._stop = chat.stop_token_ids[0]

    async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
        prompt = self._chat.decode(prompt_ids)
        self.requests.append((prompt, sampling))
        said = next(n for n, token in enumerate(reversed(prompt_ids)) if token != self._letter)
        ids = [self._letter] * 2
        if "long" in prompt and self.version < self._versions - 1:
            await self._interrupted.wait()
            return self._generation(ids, "interrupted")
        assert said in (0, 2 * self.version)
        return self._generation([*ids, self._stop], "stop")

    def _generation(self, ids: Sequence[int], reason: Any) -> Generation:
        return Generation(tuple(ids), (-1.0,) * len(ids), ((0, self.version),), reason)

    async def interrupt(self) -> None:
        self._interrupted.set()
        self._interrupted = asyncio.Event()


def config_of(**rollout: Any) -> Config:
    config = Config()
    config.rollout.tasks_per_step, config.rollout.group_size = 2, 2
    config.rollout.surplus = "park"
    config.rollout.oversample = 2.0
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return config


def long_tasks(*numbers: int) -> Callable[[int, int], Any]:
    """Draws `tasks_per_step` tasks at a time, those of the first draw with these numbers long."""

    async def draw(step: int, number: int) -> list[Task]:
        tasks = list(islice(Letters().tasks("train", 0), 2 * number, 2 * number + 2))
        if step > 1:
            return [Task(f"s{step}{task.id}", *task.__reduce__()[1][1:]) for task in tasks]
        return [
            Task(t.id, t.env, "long" if int(t.id[1:]) in numbers else "short", t.split, t.seed) for t in tasks
        ]

    return draw


class Table:
    """A pool and what it needs, in one loop."""

    def __init__(
        self,
        config: Config,
        engine: Any,
        chat: ChatTemplate,
        store: SQLiteStore,
        draw: Any,
        env: Any = Letters,
    ) -> None:
        self.engine, self.store = engine, store
        self.scheduler = RolloutScheduler(config, engine, chat, env, env().rubric)
        self.pool = Pool(config, self.scheduler, engine, store, draw)

    async def step(self, number: int) -> Harvest:
        await self.pool.begin("source")
        harvest = await self.pool.play(number, 1.0, self.engine.version, lambda done, total: None)
        self.pool.settle(harvest.trajectories)
        return harvest


def memory() -> SQLiteStore:
    return SQLiteStore(Path(":memory:"))


def tasks_of(harvest: Harvest) -> list[str]:
    return list(dict.fromkeys(t.task.id for t in harvest.trajectories))


def test_what_is_unfinished_goes_on_under_the_next_weights(chat: ChatTemplate) -> None:
    async def scenario() -> None:
        engine = Engine(chat)
        table = Table(config_of(), engine, chat, memory(), long_tasks(0, 1))
        first = await table.step(1)
        assert tasks_of(first) == ["t2", "t3"], "the long ones are not waited for"
        assert (first.metrics["rollout/parked"], first.metrics["rollout/wasted_tokens"]) == (4, 0)
        engine.version = 1
        second = await table.step(2)
        assert tasks_of(second) == ["t0", "t1"], "they come first"
        assert second.metrics["rollout/resumed"] == 4
        assert second.metrics["rollout/staleness_max"] == 1
        for trajectory in second.trajectories:
            versions = [s.weight_version for s in trajectory.segments if s.sampled]
            assert versions == [0, 1]
            assert trajectory.num_sampled == 5
            assert trajectory.token_ids[-5:] == [engine._letter] * 4 + [engine._stop]
            assert len(trajectory.behaviour_logprobs) == 5
        seeds = {s.seed for prompt, s in engine.requests if "long" in prompt}
        assert len(seeds) == 8, "what goes on does not draw the same numbers again"
        assert {s.max_tokens for prompt, s in engine.requests if "long" in prompt} == {48, 46}
        await table.pool.close()

    asyncio.run(scenario())


def test_surplus_may_be_dropped_instead(chat: ChatTemplate) -> None:
    async def scenario() -> None:
        engine, store = Engine(chat), memory()
        table = Table(config_of(surplus="drop"), engine, chat, store, long_tasks(0, 1))
        first = await table.step(1)
        assert tasks_of(first) == ["t2", "t3"]
        assert (first.metrics["rollout/parked"], first.metrics["rollout/wasted_tokens"]) == (0, 8)
        counts = store.counts()
        assert (counts.waiting, counts.leased, counts.finished, counts.learned) == (0, 0, 0, 4)
        engine.version = 1
        assert tasks_of(await table.step(2)) == ["s2t0", "s2t1"]
        await table.pool.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(("max_staleness", "waits"), [(1, True), (2, False)])
def test_a_step_waits_for_what_would_be_too_old_at_the_next(
    chat: ChatTemplate, max_staleness: int, waits: bool
) -> None:
    class Stuck(Engine):
        """A long turn goes on only once it is released."""

        async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
            if "long" in self._chat.decode(prompt_ids) and self.version and not released.is_set():
                either = [asyncio.ensure_future(e.wait()) for e in (released, self._interrupted)]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return await super().generate(prompt_ids, sampling)

    async def scenario() -> None:
        engine = Stuck(chat)
        config = config_of(max_staleness=max_staleness, oversample=1.5)
        table = Table(config, engine, chat, memory(), long_tasks(0))
        assert tasks_of(await table.step(1)) == ["t1", "t2"]
        engine.version = 1
        step = asyncio.ensure_future(table.step(2))
        if waits:
            while table.pool.played < 8:
                await asyncio.sleep(0.001)
            done, _ = await asyncio.wait({step}, timeout=0.2)
            assert not done, "all others are over, and it waits"
            released.set()
        harvest = await asyncio.wait_for(step, 60)
        assert ("t0" in tasks_of(harvest)) == waits
        assert harvest.metrics["rollout/staleness_max"] == float(waits)
        await table.pool.close()

    released = asyncio.Event()
    asyncio.run(scenario())


def test_a_resumed_run_loses_neither_finished_nor_parked_episodes(chat: ChatTemplate, tmp_path: Path) -> None:
    """The environment is brought back by its actions; a second run goes on where the first was killed."""

    async def killed() -> None:
        table = Table(config_of(), Engine(chat), chat, SQLiteStore(path), long_tasks(0, 1))
        await table.step(1)
        # Nothing is closed or told: the process is gone.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def resumed() -> None:
        engine = Engine(chat)
        engine.version = 1
        table = Table(config_of(), engine, chat, SQLiteStore(path), long_tasks(0, 1))
        harvest = await table.step(2)
        assert tasks_of(harvest) == ["t0", "t1"]
        assert harvest.metrics["rollout/resumed"] == 4
        for trajectory in harvest.trajectories:
            assert [s.weight_version for s in trajectory.segments if s.sampled] == [0, 1]
            assert not trajectory.failed
        await table.pool.close()

    path = tmp_path / "episodes.sqlite3"
    asyncio.run(killed())
    asyncio.run(resumed())


class Counting(Letters):
    """Two turns; counts them, can be restored, and may answer anew at random."""

    drifts = False
    snapshots = False
    made: list[Counting] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.turns, self.restored = 0, False
        self.made.append(self)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.turns = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        self.turns += 1
        said = f"turn {self.turns}{id(self) if self.drifts else ''} long"
        return (Message("tool", said),), 0.5, self.turns == 2, False, {}

    def snapshot(self) -> bytes | None:
        return bytes([self.turns]) if self.snapshots else None

    def restore(self, task: Task, snapshot: bytes) -> None:
        self.start_episode(task.seed, {"task": task})
        self.turns, self.restored = snapshot[0], True


@pytest.mark.parametrize(("snapshots", "drifts"), [(True, False), (False, False), (False, True)])
def test_environments_are_brought_back_by_snapshot_or_actions_or_begun_anew(
    chat: ChatTemplate, tmp_path: Path, snapshots: bool, drifts: bool
) -> None:
    class Env(Counting):
        pass

    Env.snapshots, Env.drifts, Env.made = snapshots, drifts, []

    class SecondTurnIsLong(Engine):
        async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
            said = self._chat.decode(prompt_ids)
            if "t0" in said and "turn 1" in said and self.version == 0:
                await self._interrupted.wait()
                return self._generation([self._letter], "interrupted")
            return self._generation([self._letter, self._stop], "stop")

    async def killed() -> None:
        table = Table(
            config_of(oversample=1.5), SecondTurnIsLong(chat), chat, SQLiteStore(path), long_tasks(), Env
        )
        await table.step(1)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def resumed() -> None:
        engine = SecondTurnIsLong(chat)
        engine.version = 1
        table = Table(config_of(oversample=1.5), engine, chat, SQLiteStore(path), long_tasks(), Env)
        found = [t for n in (2, 3, 4) for t in (await table.step(n)).trajectories if t.task.id == "t0"]
        assert len(found) == 2
        for trajectory in found:
            versions = [s.weight_version for s in trajectory.segments if s.sampled]
            assert versions == ([1, 1] if drifts else [0, 0, 1])
            assert trajectory.env_reward == 1.0
            assert trajectory.stop_reason == "env_done"
        assert any(env.restored for env in Env.made) == snapshots
        await table.pool.close()

    path = tmp_path / "episodes.sqlite3"
    asyncio.run(killed())
    Env.made = []
    asyncio.run(resumed())


def test_groups_that_teach_nothing_are_replaced_up_to_a_bound(chat: ChatTemplate) -> None:
    class FirstAreEqual(Rubric):
        async def judge(self, trajectory: Trajectory) -> Verdict:
            equal = int(trajectory.task.id[1:]) < 3 or not differ
            return Verdict.scored(0.0 if equal else float(trajectory.id.endswith("-1")))

    class Env(Letters):
        rubric = FirstAreEqual()

    async def drawn(**rollout: Any) -> tuple[list[str], float]:
        config = config_of(surplus="drop", oversample=1.0, **rollout)
        table = Table(config, Engine(chat), chat, memory(), long_tasks(), Env)
        harvest = await table.step(1)
        await table.pool.close()
        return tasks_of(harvest), harvest.metrics["rollout/groups_drawn"]

    differ = True
    assert asyncio.run(drawn(refill=0.0)) == (["t0", "t1"], 2)
    assert asyncio.run(drawn(refill=4.0)) == (["t0", "t1", "t2", "t3", "t4"], 5)
    differ = False
    tasks, _ = asyncio.run(drawn(refill=1.0))
    assert 3 <= len(tasks) <= 4, "at most 1.0 x 2 beyond the first two"


@pytest.mark.parametrize("limit", [{"step_tokens": 3}, {"step_s": 0.01}])
def test_a_step_s_budget_ends_it_with_what_is_finished(chat: ChatTemplate, limit: dict[str, Any]) -> None:
    class TwoShort(Engine):
        async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
            if "t1" not in self._chat.decode(prompt_ids):
                await self._interrupted.wait()
                return self._generation([self._letter], "interrupted")
            return self._generation([self._letter, self._stop], "stop")

    async def scenario() -> None:
        config = config_of(oversample=1.0, **limit)
        table = Table(config, TwoShort(chat), chat, memory(), long_tasks())
        harvest = await asyncio.wait_for(table.step(1), 60)
        assert tasks_of(harvest) == ["t1"]
        assert harvest.metrics["rollout/parked"] in (2, 4), "t0, and t2 if it was begun before the end"
        await table.pool.close()

    asyncio.run(scenario())


def test_an_environment_that_is_asked_while_the_trainer_works_is_not_waited_for(chat: ChatTemplate) -> None:
    gate = threading.Event()

    class Slow(Letters):
        def step(self, action: str) -> Any:
            if self.task.id == "t0":
                gate.wait(60)
            return super().step(action)

    async def scenario() -> None:
        table = Table(config_of(oversample=1.5), Engine(chat), chat, memory(), long_tasks(), Slow)
        assert tasks_of(await table.step(1)) == ["t1", "t2"]
        gate.set()
        table.engine.version = 1
        assert "t0" in tasks_of(await table.step(2))
        await table.pool.close()

    asyncio.run(scenario())


def test_time_at_the_closed_gate_is_not_the_episode_s(chat: ChatTemplate) -> None:
    async def scenario() -> None:
        config = config_of(oversample=2.0, episode_deadline_s=3.0)
        table = Table(config, Engine(chat), chat, memory(), long_tasks(0, 1))
        await table.step(1)
        table.pool._gate._closed_at -= 100  # as if the trainer had taken so long
        table.engine.version = 1
        harvest = await table.step(2)
        assert tasks_of(harvest) == ["t0", "t1"]
        assert not any(t.failed for t in harvest.trajectories)
        await table.pool.close()

    asyncio.run(scenario())


def test_a_dead_engine_ends_the_step_and_all_environments_are_closed(chat: ChatTemplate) -> None:
    closed = []

    class Env(Letters):
        def close(self) -> None:
            closed.append(self)

    class Dies(Engine):
        async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
            raise EngineDeadError("gone")

    async def scenario() -> None:
        table = Table(config_of(), Dies(chat), chat, memory(), long_tasks(), Env)
        with pytest.raises(EngineDeadError, match="gone"):
            await table.step(1)
        await table.pool.close()

    asyncio.run(scenario())
    assert len(closed) == 8


def test_a_verdict_is_given_again_if_asked_for(chat: ChatTemplate) -> None:
    judged = []

    class Noting(Rubric):
        async def judge(self, trajectory: Trajectory) -> Verdict:
            judged.append(trajectory.id)
            return Verdict.scored(0.5)

    class Env(Letters):
        rubric = Noting()

    async def scenario(cache: bool) -> None:
        config = config_of(surplus="drop", oversample=1.0)
        config.rubric.cache_verdicts = cache
        config.rollout.max_concurrent = 1
        table = Table(config, Engine(chat), chat, memory(), long_tasks(), Env)
        harvest = await table.step(1)
        assert [t.reward for t in harvest.trajectories] == [0.5] * 4
        await table.pool.close()

    asyncio.run(scenario(cache=False))
    assert len(judged) == 4
    judged.clear()
    asyncio.run(scenario(cache=True))
    assert len(judged) == 2, "the two responses to a task are the same words"


def test_kinds_have_limits_of_their_own(chat: ChatTemplate) -> None:
    open_now: dict[str, int] = {"long": 0, "short": 0}
    most = dict(open_now)

    class Env(Letters):
        async def step(self, action: str) -> Any:  # type: ignore[override]
            kind = self.task.kind
            open_now[kind] += 1
            most[kind] = max(most[kind], open_now[kind])
            for _ in range(20):
                await asyncio.sleep(0)
            open_now[kind] -= 1
            return (), 1.0, True, False, {}

    async def scenario() -> None:
        config = config_of(surplus="drop", oversample=1.0, group_size=6, max_per_kind={"long": 2})
        engine = Engine(chat, versions=1)
        table = Table(config, engine, chat, memory(), long_tasks(0), Env)
        harvest = await table.step(1)
        assert len(harvest.trajectories) == 12
        await table.pool.close()

    asyncio.run(scenario())
    assert most["long"] == 2
    assert most["short"] > 2


def test_many_episodes_at_once_are_all_over_and_none_is_double(chat: ChatTemplate) -> None:
    """The small sister of `make bench-episodes`: 400, of which the engine answers the last ones first."""

    class Backwards(Engine):
        waiting: list[asyncio.Event] = []  # noqa: RUF012

        async def generate(self, prompt_ids: list[int], sampling: Sampling) -> Generation:
            self.waiting.append(turn := asyncio.Event())
            if len(self.waiting) == 400:
                self.waiting[-1].set()
            await turn.wait()
            self.waiting[self.waiting.index(turn) - 1].set()
            return self._generation([self._letter, self._stop], "stop")

    async def scenario() -> None:
        config = config_of(
            surplus="drop", tasks_per_step=100, group_size=4, oversample=1.0, max_concurrent=400
        )
        store = memory()

        async def draw(step: int, number: int) -> list[Task]:
            return list(islice(Letters().tasks("train", 0), 100))

        config.inference.max_num_seqs = 200  # twice as many are let through
        table = Table(config, Backwards(chat), chat, store, draw)
        harvest = await table.step(1)
        assert len({t.id for t in harvest.trajectories}) == len(harvest.trajectories) == 400
        assert tasks_of(harvest) == [f"t{n}" for n in range(100)]
        assert store.counts().learned == 400
        await table.pool.close()

    asyncio.run(scenario())


class Compares(Rubric):
    """Says how many responses it was shown."""

    needs_group = True

    async def judge(self, trajectory: Trajectory) -> Verdict:
        raise AssertionError("asked alone")

    async def judge_group(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        await asyncio.sleep(0)
        return [
            Verdict.scored(place / 10, {"shown": len(trajectories)}) for place, _ in enumerate(trajectories)
        ]


class Compared(Letters):
    rubric = Compares()


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_responses_that_are_compared_are_judged_once_their_group_is_whole(
    chat: ChatTemplate, at_once: int
) -> None:
    async def scenario() -> None:
        store = memory()
        config = config_of(surplus="drop", oversample=1.0, group_size=4, max_concurrent=at_once)
        table = Table(config, Engine(chat), chat, store, long_tasks(), Compared)
        harvest = await asyncio.wait_for(table.step(1), 60)
        assert [t.verdict and t.verdict.components for t in harvest.trajectories] == [{"shown": 4}] * 8
        assert sorted(t.reward for t in harvest.trajectories[:4]) == [0, 0.1, 0.2, 0.3]
        assert store.counts().learned == 8
        await table.pool.close()

    asyncio.run(scenario())
