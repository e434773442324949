"""What an author wants to know before training: does an environment keep its contract, and at what speed?"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, Literal

import gymnasium
import msgspec
from gymnasium.utils.env_checker import check_env

import envs
from envs.agents import AgentEnv
from envs.base import TextEnv, maybe_await
from envs.coding.judging import judges_end
from k2rl.authoring.held import settled
from k2rl.authoring.playing import BrokenContractError, Played, continued, play
from k2rl.errors import ConfigError
from k2rl.rollouts.hosting import call
from k2rl.types import Message, Split, Task, Trajectory
from rubrics.base import judge_safely
from rubrics.deadline import MissedDeadlineError, within

SPLITS: tuple[Split, ...] = ("train", "eval")
SEEDS = (0, 1, 7)

NONSENSE = (
    "",
    "no",
    '<tool_call>{"name": "nothing", "arguments": {',
    '<tool_call>{"name": "nothing", "arguments": {}}</tool_call>',
    '{"name": 1, "parameters": "x"}',
    "<|tool_calls_section_begin|>",
    "\x00\ud800\u202e{}" + "9" * 5000 + "(" * 5000,
)
"""What a policy may write; answers to it may be anything but an exception."""

Status = Literal["ok", "note", "FAULT"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at, and what was seen."""

    about: str
    status: Status
    detail: str = ""


class Settings(msgspec.Struct, frozen=True):
    """How much is played, and how long one call to the environment may take."""

    tasks: int = 4
    deadline_s: float = 60.0
    #: Tasks of each split and seed that are drawn and compared.
    compared: int = 100


async def check(
    id: str, kwargs: dict[str, Any], settings: Settings, only: Collection[str] | None = None
) -> list[Finding]:
    """Look at an environment; none of the findings is a FAULT if it can be trained on.

    `only`: what to look at, besides the tasks; all of it if None.

    Raises:
        ConfigError: there is no such environment, it cannot be built with these arguments, or an agent plays
            it.
    """
    if isinstance(await call(envs.make, id, **kwargs), AgentEnv):
        raise ConfigError(
            f"{id} is played by its agent, not with reset() and step(): `k2rl train` rehearses an episode"
        )
    async with judges_end():
        return await _findings(_Subject(id, kwargs, settings), only)


async def _findings(subject: _Subject, only: Collection[str] | None) -> list[Finding]:
    findings = [await _found("tasks", subject.tasks)]
    if findings[0].status != "FAULT":
        findings += [
            await _found(about, look)
            for about, look in (
                ("tasks in another process", subject.elsewhere),
                ("splits", subject.splits),
                ("gymnasium", subject.gymnasium),
                ("demonstrations", subject.demonstrations),
                ("nonsense", subject.nonsense),
                ("equal seeds", subject.determinism),
                ("snapshots", subject.snapshots),
                ("leaks", subject.leaks),
                ("speed", subject.speed),
            )
            if only is None or about in only
        ]
    return findings


async def _found(about: str, look: Callable[[], Awaitable[tuple[Status, str]]]) -> Finding:
    """A finding; what an environment raises is one, too."""
    try:
        status, detail = await look()
    except BrokenContractError as error:
        return Finding(about, "FAULT", str(error))
    except MissedDeadlineError as error:
        return Finding(about, "FAULT", f"hangs: {error}")
    except Exception as error:  # noqa: BLE001 - an environment may raise anything; it is what was found
        return Finding(about, "FAULT", f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Finding(about, status, detail)


class _Subject:
    """The environment that is looked at."""

    def __init__(self, id: str, kwargs: dict[str, Any], settings: Settings) -> None:
        self._id, self._kwargs, self._settings = id, kwargs, settings
        self._chosen: list[Task] = []

    def _make(self) -> TextEnv:
        return envs.make(self._id, **self._kwargs)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[TextEnv]:
        env = await self._within(self._make)
        try:
            yield env
        finally:
            await self._within(env.close)

    async def _within(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await within(self._settings.deadline_s, call(function, *args, **kwargs))

    async def _draw(self, split: Split, seed: int, number: int) -> list[Task]:
        async with self._open() as env:
            return list(await self._within(lambda: list(islice(env.tasks(split, seed), number))))

    async def _play(self, task: Task, turns: Sequence[str | Message]) -> Played:
        async with self._open() as env:
            return await play(env, task, turns, self._settings.deadline_s)

    async def _demonstration(self, task: Task) -> Sequence[str | Message] | None:
        async with self._open() as env:
            turns: Sequence[str | Message] | None = await self._within(env.demonstration, task)
            return turns

    async def tasks(self) -> tuple[Status, str]:
        kinds = (await self._within(self._make)).kinds
        seen: set[str] = set()
        for split in SPLITS:
            for seed in SEEDS[:2]:
                tasks = await self._draw(split, seed, self._settings.compared)
                if not tasks:
                    raise BrokenContractError(f"tasks({split!r}, {seed}) gives none")
                for task in tasks:
                    _check_task(task, split, kinds)
                if tasks != await self._draw(split, seed, self._settings.compared):
                    raise BrokenContractError(f"tasks({split!r}, {seed}) gives others the second time")
                seen |= {task.kind for task in tasks}
                if split == "train" and seed == SEEDS[0]:
                    self._chosen = _one_of_each(tasks, self._settings.tasks)
        missing = sorted(set(kinds) - seen)
        if missing:
            return "note", f"none of kind {', '.join(missing)} among {self._settings.compared} of each split"
        return "ok", f"kinds: {', '.join(sorted(seen))}"

    async def elsewhere(self) -> tuple[Status, str]:
        """Another process, whose strings hash differently, has to draw the same tasks."""
        here = await self._draw("train", SEEDS[0], 20)
        code = (
            "import sys; from itertools import islice; import envs, msgspec; id, kwargs = sys.argv[1:]; "
            "env = envs.make(id, **msgspec.json.decode(kwargs)); "
            f"print(msgspec.json.encode(list(islice(env.tasks('train', {SEEDS[0]}), 20))).decode())"
        )
        ran = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", code, self._id, msgspec.json.encode(self._kwargs).decode()],
            env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=self._settings.deadline_s,
            check=False,
        )
        if ran.returncode:
            raise BrokenContractError(f"another process cannot draw tasks: {ran.stderr.strip()[-300:]}")
        if ran.stdout.splitlines()[-1:] != [msgspec.json.encode(here).decode()]:
            raise BrokenContractError("another process draws other tasks for the same seed: hash() or a set?")
        return "ok", "the same"

    async def splits(self) -> tuple[Status, str]:
        found: dict[Split, set[bytes]] = {}
        for split in SPLITS:
            drawn = [
                task for seed in SEEDS for task in await self._draw(split, seed, self._settings.compared)
            ]
            found[split] = {msgspec.json.encode((task.kind, task.data), order="sorted") for task in drawn}
        common = found["train"] & found["eval"]
        if common:
            example = min(common).decode()[:200]
            raise BrokenContractError(f"{len(common)} tasks are in both train and eval, such as {example}")
        return "ok", f"{len(found['train'])} of train and {len(found['eval'])} of eval have none in common"

    async def gymnasium(self) -> tuple[Status, str]:
        loop = asyncio.get_running_loop()

        def answered(value: Any) -> Any:
            """What an environment answers; one that is awaited, on the loop that its other episodes use."""
            waited = asyncio.run_coroutine_threadsafe(maybe_await(value), loop)
            return waited.result(self._settings.deadline_s)

        def work() -> None:
            env = _Answering(self._make(), answered)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # Nothing here renders, and that check warns about all that is not from `gymnasium.make`.
                check_env(env, skip_render_check=True, skip_close_check=True)
            close: Callable[[], Any] = env.env.close
            answered(close())

        await within(4 * self._settings.deadline_s, call(work))
        return "ok", "its check_env accepts it"

    async def demonstrations(self) -> tuple[Status, str]:
        rewards, without = [], []
        async with self._open() as env:
            rubric = envs.rubric_of(env)
        low, high = rubric.reward_range
        for task in self._chosen:
            turns = await self._demonstration(task)
            if turns is None:
                without.append(task.kind)
                continue
            played = await self._play(task, turns)
            if not played.over:
                raise BrokenContractError(f"the demonstration of {task.id} does not end its episode")
            trajectory = Trajectory(task.id, task.id, task, 0.0, messages=_chat(played, turns))
            trajectory.env_reward, trajectory.reward_components = played.reward, played.components
            verdict = await judge_safely(rubric, trajectory, self._settings.deadline_s)
            if verdict.value is None:
                raise BrokenContractError(f"the judge fails on a demonstration: {verdict.failure}")
            if not verdict.value > low:
                raise BrokenContractError(
                    f"the demonstration of {task.id} earns {verdict.value:g}, the lowest reward there is"
                )
            rewards.append(verdict.value)
        if not rewards:
            return "note", "none: warm starts need `warm_start=none`"
        text = f"earn {min(rewards):g} to {max(rewards):g}, of {low:g} to {high:g}"
        return ("note", f"{text}; none of kind {', '.join(without)}") if without else ("ok", text)

    async def nonsense(self) -> tuple[Status, str]:
        async with self._open() as env:
            low, high = envs.rubric_of(env).reward_range
            own = type(envs.rubric_of(env)).__name__ == "EnvironmentReward"
        best = -math.inf
        for task in self._chosen:
            for turn in NONSENSE:
                played = await self._play(task, [turn] * 3)
                if own and not low - 1e-6 <= played.reward <= high + 1e-6:
                    raise BrokenContractError(
                        f"{turn[:40]!r} earns {played.reward:g}, outside {low:g} to {high:g}"
                    )
                best = max(best, played.reward)
        if own and best >= high:
            return "note", f"an answer that says nothing earns {best:g}, the most there is"
        return "ok", f"earns at most {best:g}"

    async def determinism(self) -> tuple[Status, str]:
        for task in self._chosen:
            turns = await self._demonstration(task) or ["I do not know."] * 3
            first, again = await self._play(task, turns), await self._play(task, turns)
            for number, (one, other) in enumerate(zip(first.steps, again.steps, strict=False)):
                if one != other:
                    where = "reset" if number == 0 else f"step {number}"
                    raise BrokenContractError(
                        f"two episodes of {task.id} with the same seed and turns differ at {where}"
                    )
            if first != again:
                raise BrokenContractError(f"two episodes of {task.id} differ in length or tools")
        return "ok", f"{len(self._chosen)} episodes, played twice, are the same"

    async def snapshots(self) -> tuple[Status, str]:
        """An episode that goes on from a snapshot goes on as the one it was taken of."""
        deadline = self._settings.deadline_s
        for task in self._chosen:
            turns = await self._demonstration(task) or ["I do not know."] * 3
            async with self._open() as env:
                await play(env, task, turns[:1] if len(turns) > 1 else [], deadline)
                taken = await self._within(env.snapshot)
                if taken is None:
                    return "ok", "none: an episode is resumed where it is, or replayed"
                if not isinstance(taken, bytes):
                    raise BrokenContractError(f"snapshot gives {type(taken).__name__}, not bytes or None")
                rest = turns[1:] if len(turns) > 1 else turns
                expected = await continued(env, rest, deadline)
            async with self._open() as other:
                await self._within(other.restore, task, taken)
                if await continued(other, rest, deadline) != expected:
                    raise BrokenContractError(
                        f"an episode of {task.id} goes on differently from its snapshot"
                    )
        return "ok", "episodes go on from them"

    async def leaks(self) -> tuple[Status, str]:
        """What a round of episodes leaves behind, after one in which caches may have been filled."""

        async def round_of_episodes() -> None:
            for task in self._chosen:
                await self._play(task, ["I do not know."] * 2)

        await round_of_episodes()
        before = await settled()
        await round_of_episodes()
        after = await settled(before)
        grown = [f"{after[what] - before[what]} {what}" for what in before if after[what] > before[what]]
        if grown:
            raise BrokenContractError(f"{len(self._chosen)} closed episodes leave behind: {', '.join(grown)}")
        return "ok", f"none of {', '.join(before)}"

    async def speed(self) -> tuple[Status, str]:
        async with self._open() as env:
            started = time.perf_counter()
            drawn = await self._within(
                lambda: len(list(islice(env.tasks("train", 3), self._settings.compared)))
            )
            tasks_s = (time.perf_counter() - started) / drawn
        seconds: dict[str, list[float]] = {"reset": [], "step": []}
        for task in self._chosen:
            turns = await self._demonstration(task) or ["I do not know."] * 3
            async with self._open() as env:
                started = time.perf_counter()
                await play(env, task, [], self._settings.deadline_s)
                seconds["reset"].append(time.perf_counter() - started)
                started = time.perf_counter()
                steps = await continued(env, turns, self._settings.deadline_s)
                seconds["step"].append((time.perf_counter() - started) / len(steps))
        reset, step = (1000 * sum(values) / len(values) for values in seconds.values())
        return "ok", f"task {1000 * tasks_s:.2f} ms, reset {reset:.1f} ms, step {step:.1f} ms"


class _Answering(gymnasium.Env[Any, Any]):
    """An environment as Gymnasium's checker calls one: it waits for answers that are awaited."""

    def __init__(self, env: TextEnv, answered: Callable[[Any], Any]) -> None:
        self.env, self._answered = env, answered
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self._answered(self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> Any:
        return self._answered(self.env.step(action))


def _check_task(task: Any, split: Split, kinds: tuple[str, ...]) -> None:
    if not isinstance(task, Task):
        raise BrokenContractError(f"tasks gives {type(task).__name__}, not a Task")
    if task.split != split:
        raise BrokenContractError(f"task {task.id} of tasks({split!r}, …) says that it is of {task.split!r}")
    if task.kind not in kinds:
        raise BrokenContractError(f"task {task.id} is of kind {task.kind!r}, but kinds is {kinds}")
    try:
        same = msgspec.json.decode(msgspec.json.encode(task), type=Task) == task
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise BrokenContractError(f"task {task.id}: its data are no JSON values ({error})") from error
    if not same:
        raise BrokenContractError(
            f"task {task.id}: its data are no JSON values (tuples, keys that are no text?)"
        )


def _one_of_each(tasks: Sequence[Task], number: int) -> list[Task]:
    """Tasks to play: the first of each kind, then the first ones."""
    firsts = list({task.kind: task for task in reversed(tasks)}.values())[::-1]
    return [*firsts, *(task for task in tasks if task not in firsts)][: max(number, len(firsts))]


def _chat(played: Played, turns: Sequence[str | Message]) -> list[Message]:
    said = [turn if isinstance(turn, Message) else Message("assistant", turn) for turn in turns]
    messages = list(played.steps[0].messages)
    for turn, step in zip(said, played.steps[1:], strict=False):
        messages += [turn, *step.messages]
    return messages
