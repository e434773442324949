"""How hard tasks are for a model, and which of them are worth training on (`k2rl difficulty`).

From what `k2rl eval suite=… samples=N` has found. Tasks that are always or never solved have no gradient;
those that are solved without reasoning are guessed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from k2rl.errors import ConfigError
from k2rl.evaluation.passk import pass_at_k
from k2rl.evaluation.suite_episodes import EpisodeRecord
from k2rl.evaluation.suite_options import SuiteOptions
from k2rl.evaluation.suite_results import EPISODES, RESULTS, SuiteResults
from k2rl.evaluation.suites import load_suite
from k2rl.evaluation.words import read_words

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
BANDS = ((0.25, "hard"), (0.75, "moderate"), (1.0, "easy"))


class DifficultyOptions(msgspec.Struct, frozen=True):
    """Every field is a key of the command line."""

    #: File of the tasks' rows, whose `id` or `task_id` names them; empty: the suite's own tasks.
    tasks: str = ""
    #: Where the tasks go that are kept.
    out: str = ""
    #: Results of an evaluation in which the model answered at once: what it solved there was guessed.
    guess: str = ""
    #: Tasks are kept whose share of solved answers is above `low` and below `high`.
    low: Share = 0.0
    high: Share = 1.0
    #: A task is guessed if it is solved more often than this in `guess`.
    guessed: Share = 0.0
    #: pass@k for these, separated by commas.
    k: str = "1"
    #: Only tasks with one of these tags, separated by commas; empty: all.
    tags: str = ""


class Profile(msgspec.Struct, frozen=True):
    """A task's answers; failed ones are in no share."""

    answers: int
    solved: int
    failed: int
    tags: tuple[str, ...]
    guesses: int = 0
    guessed: int = 0

    @property
    def share(self) -> float | None:
        return self.solved / self.answers if self.answers else None


def run(words: Sequence[str]) -> str:
    """Profile and write; returns what to print.

    Raises:
        ConfigError: one line; nothing was written.
    """
    folders = [word for word in words if "=" not in word]
    options = read_words([word for word in words if "=" in word], DifficultyOptions, "difficulty")
    if len(folders) != 1 or not options.out:
        raise ConfigError("usage: k2rl difficulty RESULTS_FOLDER out=FILE.jsonl; see k2rl difficulty --help")
    if options.low >= options.high:
        raise ConfigError(f"low={options.low:g} must be below high={options.high:g}")
    try:
        ks = sorted({int(part) for part in options.k.split(",")})
    except ValueError:
        raise ConfigError(f"k={options.k} is no list of numbers") from None
    profiles = profile(records_of(Path(folders[0])), records_of(Path(options.guess)) if options.guess else [])
    rows = _rows(Path(options.tasks)) if options.tasks else _suite_rows(Path(folders[0]))
    kept, dropped = chosen(profiles, options)
    written = []
    for name, row in rows:
        found = next((t for t in kept if t == name or t.endswith(f"/{name}")), None)
        if found is not None:
            written.append(with_profile(row, profiles[found], ks))
    if not written:
        raise ConfigError(
            f"no task is left to write: {_counts(dropped)}; {len(rows)} rows, {len(kept)} tasks that are kept"
        )
    path = Path(options.out)
    unfinished = path.with_suffix(path.suffix + ".tmp")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), "utf-8")
    unfinished.replace(path)
    shares = [share for p in profiles.values() if (share := p.share) is not None]
    mean = sum(shares) / len(shares) if shares else 0.0
    return "\n".join(
        [
            f"{len(profiles)} tasks, solved {mean:.1%} of the time on average",
            f"dropped: {_counts(dropped)}",
            f"kept {len(written)}: {path}",
        ]
    )


def records_of(folder: Path) -> list[EpisodeRecord]:
    """The episodes of an evaluation.

    Raises:
        ConfigError: it has none that can be read.
    """
    try:
        lines = (folder / EPISODES).read_bytes().splitlines()
        return [msgspec.json.decode(line, type=EpisodeRecord) for line in lines if line.strip()]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{folder} is no folder with results of `k2rl eval suite=…` ({error})") from error


def profile(records: Iterable[EpisodeRecord], guesses: Iterable[EpisodeRecord] = ()) -> dict[str, Profile]:
    """Every task's answers, and those that were given without reasoning."""
    answers: defaultdict[str, list[EpisodeRecord]] = defaultdict(list)
    guessed: defaultdict[str, list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        answers[record.task].append(record)
    for record in guesses:
        guessed[record.task].append(record)
    return {
        task: Profile(
            answers=sum(record.reward is not None for record in found),
            solved=sum(record.solved for record in found),
            failed=sum(record.reward is None for record in found),
            tags=found[0].tags,
            guesses=sum(record.reward is not None for record in guessed[task]),
            guessed=sum(record.solved for record in guessed[task]),
        )
        for task, found in answers.items()
    }


def chosen(profiles: dict[str, Profile], options: DifficultyOptions) -> tuple[list[str], dict[str, int]]:
    """The tasks to train on, and how many were left out for which reason."""
    wanted = {tag.strip() for tag in options.tags.split(",") if tag.strip()}
    kept, dropped = (
        [],
        dict.fromkeys(("never solved", "always solved", "guessed", "not judged", "other tags"), 0),
    )
    for task, found in profiles.items():
        if found.share is None:
            dropped["not judged"] += 1
        elif wanted and not wanted & set(found.tags):
            dropped["other tags"] += 1
        elif found.share <= options.low:
            dropped["never solved"] += 1
        elif found.share >= options.high:
            dropped["always solved"] += 1
        elif found.guesses and found.guessed / found.guesses > options.guessed:
            dropped["guessed"] += 1
        else:
            kept.append(task)
    return kept, dropped


def with_profile(row: dict[str, Any], found: Profile, ks: Sequence[int]) -> dict[str, Any]:
    """A row with its difficulty, and a tag for its band."""
    share = found.share or 0.0
    band = next(name for most, name in BANDS if share <= most)
    pass_at = {f"pass@{k}": pass_at_k(found.answers, found.solved, k) for k in ks if k <= found.answers}
    tags = list(dict.fromkeys([*row.get("tags", []), *found.tags, band]))
    return row | {"tags": tags, "difficulty": {"answers": found.answers, "solved": found.solved, **pass_at}}


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if line.strip():
                row = json.loads(line)
                name = row.get("id", row.get("task_id")) if isinstance(row, dict) else None
                if name is None:
                    raise ConfigError(f"{path}, line {number}: a task needs an `id` or `task_id`")
                found.append((str(name), row))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def _suite_rows(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        results = msgspec.json.decode((folder / RESULTS).read_bytes(), type=SuiteResults)
        suite = load_suite(SuiteOptions(**results.options))
    except (OSError, msgspec.DecodeError, TypeError) as error:
        raise ConfigError(
            f"{folder}: its suite cannot be read ({error}); name the rows with tasks=FILE"
        ) from error
    return [(task.id, msgspec.to_builtins(task)) for task in suite.tasks]


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "none"
