"""One episode of an evaluation, as a record; played, or found among those that were finished before."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import envs
from envs.base import TextEnv
from k2rl.errors import RunError
from k2rl.evaluation.policies import ContextFullError, Policy
from k2rl.evaluation.suites import Suite, tags_of
from k2rl.rollouts.hosting import call, hosted
from k2rl.types import Message, StopReason, Task, Trajectory
from rubrics.base import judge_safely
from rubrics.deadline import MissedDeadlineError

JUDGE_S = 300.0
#: Changes when records of earlier versions can't be read or compared any more.
FORMAT = 2


class EpisodeRecord(msgspec.Struct, frozen=True):
    """What came of one answer to a task; `reward` is None if there is no score, and `failure` says why."""

    task: str
    kind: str
    tags: tuple[str, ...]
    sample: int
    reward: float | None
    failure: str | None = None
    components: dict[str, float] = {}
    #: What the judge says about the first thing that is wrong.
    detail: str = ""
    stop: StopReason = "env_done"
    turns: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    messages: list[Message] = []

    @property
    def solved(self) -> bool:
        return self.reward is not None and self.reward >= 1.0


class _Played(msgspec.Struct):
    trajectory: Trajectory
    detail: str = ""
    turns: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


async def play(suite: Suite, task: Task, sample: int, policy: Policy, deadline_s: float) -> EpisodeRecord:
    """Play one episode and judge it; what fails but the model is this episode's failure, and no score.

    Raises:
        RunError: the model cannot be asked any more.
    """
    started = time.monotonic()
    played = _Played(Trajectory(f"{task.id}/{sample}", task.id, task, temperature=0.0))
    rubric = None

    async def episode(env: TextEnv) -> None:
        nonlocal rubric
        rubric = envs.rubric_of(env)
        await _take_turns(played, suite, task, sample, policy, env)

    failure = None
    try:
        await hosted(suite.make_env, episode, deadline_s)
    except RunError:
        raise
    except MissedDeadlineError:
        failure = f"not over after episode_s={deadline_s:g} s"
    # Environments may raise anything; whatever it is, it is this episode's failure and not a score.
    except Exception as error:  # noqa: BLE001
        failure = f"{type(error).__name__}: {error}"
    trajectory, reward, components = played.trajectory, None, {}
    if failure is None and rubric is not None:
        verdict = await judge_safely(rubric, trajectory, JUDGE_S)
        failure, reward, components = verdict.failure, verdict.value, verdict.components
    return EpisodeRecord(
        task=task.id,
        kind=task.kind,
        tags=tags_of(task),
        sample=sample,
        reward=reward,
        failure=failure,
        components=components,
        detail=played.detail,
        stop="failed" if failure else trajectory.stop_reason,
        turns=played.turns,
        prompt_tokens=played.prompt_tokens,
        completion_tokens=played.completion_tokens,
        seconds=round(time.monotonic() - started, 3),
        messages=trajectory.messages,
    )


async def _take_turns(
    played: _Played, suite: Suite, task: Task, sample: int, policy: Policy, env: TextEnv
) -> None:
    trajectory = played.trajectory
    messages, _ = await call(env.reset, seed=task.seed, options={"task": task})
    trajectory.messages += messages
    for number in range(suite.max_turns):
        try:
            reply = await policy.turn(task, trajectory.messages, number, sample, env)
        except ContextFullError:
            trajectory.stop_reason = "context"
            return
        played.turns += 1
        played.prompt_tokens += reply.prompt_tokens
        played.completion_tokens += reply.completion_tokens
        trajectory.messages.append(Message("assistant", reply.text))
        messages, reward, terminated, truncated, info = await call(env.step, reply.text)
        trajectory.messages += messages
        trajectory.env_reward += float(reward)
        for name, value in info.get("reward_components", {}).items():
            trajectory.reward_components[name] = trajectory.reward_components.get(name, 0.0) + float(value)
        played.detail = str(info.get("detail", ""))
        if terminated or truncated:
            trajectory.stop_reason = "env_done" if terminated else "env_truncated"
            return
    trajectory.stop_reason = "max_turns"


class EpisodeCache:
    """Finished episodes by all that they depend on; failures are not kept. A folder of small files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> EpisodeRecord | None:
        """The record of this key; one that is damaged counts as missing."""
        try:
            return msgspec.json.decode(self._path(key).read_bytes(), type=EpisodeRecord)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def put(self, key: str, record: EpisodeRecord) -> None:
        """Keep an episode, unless it failed.

        Raises:
            RunError: it cannot be written.
        """
        if record.failure is not None:
            return
        path = self._path(key)
        unfinished = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(encoded(record))
            unfinished.replace(path)
        except OSError as error:
            reason = error.strerror
            raise RunError(f"{path} cannot be written: {reason}; cache=off keeps nothing") from error

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key[2:]}.json"


def cache_key(suite: Suite, task: Task, sample: int, identity: str, sampling: Sequence[object]) -> str:
    """Of all that decides what an episode comes to: task, model, sampling, environment and its code."""
    played = (suite.env, suite.kwargs, suite.max_turns, suite.code_digest)
    parts = (FORMAT, task, sample, identity, list(sampling), played)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def encoded(record: EpisodeRecord) -> bytes:
    """A record as JSON; lone surrogates, which a model or tool may write, become question marks."""
    try:
        return msgspec.json.encode(record)
    except UnicodeEncodeError:
        messages = [
            msgspec.structs.replace(message, content=message.content.encode("utf-8", "replace").decode())
            for message in record.messages
        ]
        detail = record.detail.encode("utf-8", "replace").decode()
        return msgspec.json.encode(msgspec.structs.replace(record, messages=messages, detail=detail))
