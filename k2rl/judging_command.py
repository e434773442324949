"""What `k2rl judge FILE.jsonl reward=…` does: judge episodes, beside labels if they have them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

import rubrics.registry
from k2rl.choices import config_folder
from k2rl.errors import ConfigError, RunError
from k2rl.evaluation.words import read_words
from k2rl.types import Message, Task, Trajectory, Verdict
from rubrics.base import Rubric
from rubrics.groups import judge_group_safely
from rubrics.models import asks_run_model, models_of

Positive = Annotated[float, msgspec.Meta(gt=0)]


class JudgeOptions(msgspec.Struct, frozen=True):
    """Every field is a key of the command line."""

    #: A choice of `conf/rubric/`, a file like those, a registered rubric, or `module:Class`.
    reward: str = ""
    #: Values from which an episode counts as right, for what is compared with labels.
    threshold: float = 0.5
    deadline_s: Positive = 60.0
    parallel: Annotated[int, msgspec.Meta(ge=1)] = 16
    #: A file for the episodes with their verdicts.
    out: str = ""
    output: str = "text"
    #: Arguments of the rubric: `reward.place=boxed`.
    reward_values: dict[str, str] = {}


class Judged(msgspec.Struct, frozen=True):
    """What came of judging a file; what is compared are verdicts of episodes that have a label."""

    reward: str
    episodes: int
    scored: int
    failed: int
    failed_share: float
    mean: float | None
    labelled: int
    agreement: float | None
    #: Agreement beyond chance (Cohen's kappa).
    kappa: float | None
    #: Counts by label and verdict: `right_right`, `right_wrong` (a right answer judged wrong), …
    confusion: dict[str, int]
    failures: dict[str, int]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    seconds: float


def run(words: Sequence[str]) -> str:
    """Judge; returns what to print.

    Raises:
        ConfigError: one line; nothing was judged.
        RunError: nothing could be judged.
    """
    files = [word for word in words if "=" not in word]
    options = read_words([word for word in words if "=" in word], JudgeOptions, "judge", ["reward"])
    if len(files) != 1 or not options.reward:
        raise ConfigError("usage: k2rl judge FILE.jsonl reward=NAME; `k2rl judge --help` lists rewards")
    if options.output not in ("text", "json"):
        raise ConfigError(f"output={options.output} must be text or json")
    rubric = rubric_of(options)
    episodes = read_episodes(Path(files[0]))
    started = time.monotonic()
    verdicts = asyncio.run(_judged(rubric, [episode for episode, _ in episodes], options))
    found = summed_up(options, rubric, episodes, verdicts, time.monotonic() - started)
    if options.out:
        lines = [
            msgspec.json.encode(msgspec.structs.replace(episode, verdict=verdict))
            for (episode, _), verdict in zip(episodes, verdicts, strict=True)
        ]
        Path(options.out).write_bytes(b"\n".join(lines) + b"\n")
    if not found.scored:
        raise RunError(
            f"none of {found.episodes} episodes was judged: {next(iter(found.failures), 'no reason')}"
        )
    return json.dumps(msgspec.to_builtins(found), indent=1) if options.output == "json" else as_text(found)


def rubric_of(options: JudgeOptions) -> Rubric:
    """The rubric that is asked for.

    Raises:
        ConfigError: one line.
    """
    preset = config_folder() / "rubric" / f"{options.reward}.yaml"
    path = preset if preset.is_file() else Path(options.reward)
    id, kwargs = options.reward, {}
    if path.suffix in (".yaml", ".yml"):
        try:
            spec = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"reward={options.reward}: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(spec, dict) or not isinstance(spec.get("id"), str):
            raise ConfigError(f"reward={options.reward} is no file with `id: …` and `kwargs: …`")
        id, kwargs = spec["id"], dict(spec.get("kwargs") or {})
    if id == "env":
        id = "environment_reward"
    for name, value in options.reward_values.items():
        target = kwargs
        *outer, last = name.split(".")
        for key in outer:
            target = target.setdefault(key, {})
        target[last] = yaml.safe_load(value)
    rubric = rubrics.registry.make(id, **kwargs)
    if asks_run_model(rubric):
        raise ConfigError(
            f"reward={options.reward} asks the model of a run: name one with a url, reward.model=…"
        )
    return rubric


def read_episodes(path: Path) -> list[tuple[Trajectory, float | None]]:
    """The episodes of a file and their labels: trajectories (labelled by an earlier verdict), or rows.

    A row has `response`, perhaps `prompt`, `label` and `group`; all of it is the task's data.

    Raises:
        ConfigError: one line: there is no such file, or a line is wrong.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            episode, label = _trajectory(row) if "messages" in row and "task" in row else _row(row, number)
            if label is not None and not math.isfinite(label):
                raise ValueError(f"its label is {label}")
        except (msgspec.DecodeError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        found.append((episode, label))
    if not found:
        raise ConfigError(f"{path} has no episodes")
    return found


def _trajectory(row: dict[str, Any]) -> tuple[Trajectory, float | None]:
    label = row.pop("label", None)
    episode = msgspec.convert(row, Trajectory)
    before = None if episode.verdict is None else episode.verdict.value
    episode.verdict = None if episode.stop_reason != "failed" else episode.verdict
    return episode, before if label is None else float(label)


def _row(row: dict[str, Any], number: int) -> tuple[Trajectory, float | None]:
    response, prompt = row.get("response"), row.get("prompt", "")
    if not isinstance(response, str) or not isinstance(prompt, str):
        raise ValueError("a row needs a text `response`, and `prompt` is a text")
    id, label = str(row.get("id", number)), row.get("label")
    data = {key: value for key, value in row.items() if key not in ("response", "label")}
    task = Task(id, str(row.get("env", "file")), str(row.get("kind", "default")), "eval", 0, data)
    messages = [*([Message("user", prompt)] if prompt else []), Message("assistant", response)]
    group = str(row.get("group", prompt or id))
    return Trajectory(
        f"{id}-{number}", group, task, 0.0, messages=messages
    ), None if label is None else float(label)


async def _judged(rubric: Rubric, episodes: Sequence[Trajectory], options: JudgeOptions) -> list[Verdict]:
    slots = asyncio.Semaphore(options.parallel)
    groups: defaultdict[str, list[Trajectory]] = defaultdict(list)
    for place, episode in enumerate(episodes):
        groups[episode.group_id if rubric.needs_group else str(place)].append(episode)

    async def judge(group: list[Trajectory]) -> list[tuple[int, Verdict]]:
        async with slots:
            verdicts = await judge_group_safely(rubric, group, options.deadline_s)
        return [(id(episode), verdict) for episode, verdict in zip(group, verdicts, strict=True)]

    try:
        found = await asyncio.gather(*(judge(group) for group in groups.values()))
    finally:
        await rubric.close()
    by_episode = dict(pair for pairs in found for pair in pairs)
    return [by_episode[id(episode)] for episode in episodes]


def summed_up(
    options: JudgeOptions,
    rubric: Rubric,
    episodes: Sequence[tuple[Trajectory, float | None]],
    verdicts: Sequence[Verdict],
    seconds: float,
) -> Judged:
    """What there is to say of the verdicts."""
    values = [verdict.value for verdict in verdicts if verdict.value is not None]
    failures = Counter(
        (verdict.failure or "").partition(": ")[2][:160] for verdict in verdicts if not verdict.ok
    )
    confusion = dict.fromkeys(("right_right", "right_wrong", "wrong_right", "wrong_wrong"), 0)
    for (_, label), verdict in zip(episodes, verdicts, strict=True):
        if label is not None and verdict.value is not None:
            said = ("wrong", "right")[verdict.value >= options.threshold]
            confusion[f"{('wrong', 'right')[label >= options.threshold]}_{said}"] += 1
    labelled = sum(confusion.values())
    agreement = (confusion["right_right"] + confusion["wrong_wrong"]) / labelled if labelled else None
    usages = [model.usage for model in models_of(rubric)]
    return Judged(
        reward=options.reward,
        episodes=len(verdicts),
        scored=len(values),
        failed=len(verdicts) - len(values),
        failed_share=1 - len(values) / len(verdicts),
        mean=math.fsum(values) / len(values) if values else None,
        labelled=labelled,
        agreement=agreement,
        kappa=_kappa(confusion),
        confusion=confusion,
        failures=dict(failures.most_common(5)),
        requests=sum(usage.requests for usage in usages),
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cost=math.fsum(usage.cost for usage in usages),
        seconds=round(seconds, 3),
    )


def _kappa(confusion: dict[str, int]) -> float | None:
    n = sum(confusion.values())
    if not n:
        return None
    rr, rw, wr, ww = confusion.values()
    chance = ((rr + rw) * (rr + wr) + (wr + ww) * (rw + ww)) / n**2
    return 1.0 if chance == 1 else ((rr + ww) / n - chance) / (1 - chance)


def as_text(found: Judged) -> str:
    """For people."""
    lines = [
        f"{found.reward}: {found.scored} of {found.episodes} episodes judged, "
        f"failed {found.failed_share:.1%}, mean {'-' if found.mean is None else f'{found.mean:.3f}'}"
    ]
    if found.agreement is not None and found.kappa is not None:
        c = found.confusion
        lines += [
            f"agreement with {found.labelled} labels: {found.agreement:.1%} (kappa {found.kappa:.2f})",
            "              judged right  judged wrong",
            f"  label right {c['right_right']:12}  {c['right_wrong']:12}",
            f"  label wrong {c['wrong_right']:12}  {c['wrong_wrong']:12}",
        ]
    lines += [f"failed, {count} times: {reason}" for reason, count in found.failures.items()]
    if found.requests:
        lines.append(
            f"cost: {found.requests} requests, {found.prompt_tokens} + {found.completion_tokens} tokens, "
            f"{found.cost:.4f} by the prices given"
        )
    return "\n".join([*lines, f"seconds: {found.seconds:.1f}"])


def rewards() -> str:
    """What `k2rl judge --help` lists."""
    presets = sorted(path.stem for path in (config_folder() / "rubric").glob("*.yaml"))
    lines = [f"  {id:<20} {text}" for id, text in rubrics.registry.available().items()]
    missing = [
        name for name in ("httpx", "jsonschema", "math_verify") if importlib.util.find_spec(name) is None
    ]
    note = [f"not installed: {', '.join(missing)} (pip install 'k2rl[judges]')"] if missing else []
    return "\n".join([f"rewards; choices of conf/rubric: {', '.join(presets)}; registered:", *lines, *note])
