"""What an evaluation of a suite found: `results.json` and `episodes.jsonl` in its folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from k2rl.errors import ConfigError
from k2rl.evaluation.passk import average_ci95, pass_at_k_ci95
from k2rl.evaluation.stats import Estimate
from k2rl.evaluation.suite_episodes import EpisodeRecord, encoded

RESULTS = "results.json"
EPISODES = "episodes.jsonl"


class Score(msgspec.Struct, frozen=True):
    """Of all tasks, or of those with a tag. Tasks without a scored answer are in no mean, and counted."""

    tasks: int
    #: Tasks of which all answers that were scored are right.
    solved: int
    #: Answers without a score, which are no zeros.
    failed: int
    #: Mean reward over tasks of the mean over their answers.
    average: Estimate | None
    #: k -> pass@k.
    pass_at: dict[int, Estimate] = {}


class SuiteResults(msgspec.Struct, frozen=True):
    """A whole evaluation."""

    suite: str
    model: str
    started: str
    options: dict[str, Any]
    #: Digest of the suite's tasks: two evaluations with the same one can be compared.
    digest: str
    #: Tasks times samples, and how many of them were played.
    planned: int
    played: int
    overall: Score
    per_tag: dict[str, Score] = {}
    #: Why not all were played; empty if they were.
    stopped_by: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    reused: int = 0
    failures: dict[str, int] = {}

    @property
    def fraction(self) -> str:
        """`164/164`: solved tasks of those that were played."""
        return f"{self.overall.solved}/{self.overall.tasks}"


def score(records: Iterable[EpisodeRecord], ks: Sequence[int]) -> Score:
    """The score of some episodes."""
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    failed = 0
    for record in records:
        rewards[record.task] += [] if record.reward is None else [record.reward]
        failed += record.reward is None
    right = {task: (len(values), sum(value >= 1.0 for value in values)) for task, values in rewards.items()}
    pass_at = {k: estimate for k in ks if (estimate := pass_at_k_ci95(right, k)) is not None}
    solved = sum(n > 0 and correct == n for n, correct in right.values())
    return Score(len(rewards), solved, failed, average_ci95(rewards), pass_at)


def per_tag(records: Sequence[EpisodeRecord], ks: Sequence[int]) -> dict[str, Score]:
    """The score of each tag, the most frequent first."""
    by_tag: defaultdict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        for tag in dict.fromkeys(record.tags):
            by_tag[tag].append(record)
    order = sorted(by_tag, key=lambda tag: (-len(by_tag[tag]), tag))
    return {tag: score(by_tag[tag], ks) for tag in order}


def save(folder: Path, results: SuiteResults, records: Sequence[EpisodeRecord]) -> None:
    """Write both files whole."""
    for name, content in (
        (EPISODES, b"".join(encoded(record) + b"\n" for record in records)),
        (RESULTS, msgspec.json.format(msgspec.json.encode(results), indent=2)),
    ):
        unfinished = folder / f"{name}.tmp"
        unfinished.write_bytes(content)
        unfinished.replace(folder / name)


def load(folder: Path) -> tuple[SuiteResults, list[EpisodeRecord]]:
    """What `save` wrote.

    Raises:
        ConfigError: one line: the folder holds no finished evaluation of a suite.
    """
    try:
        results = msgspec.json.decode((folder / RESULTS).read_bytes(), type=SuiteResults)
        lines = (folder / EPISODES).read_bytes().splitlines()
        return results, [msgspec.json.decode(line, type=EpisodeRecord) for line in lines]
    except OSError as error:
        raise ConfigError(
            f"{folder} is not the folder of an evaluation of a suite: {error.strerror}"
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{folder} holds a damaged evaluation: {error}") from error
