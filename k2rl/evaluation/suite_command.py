"""What `k2rl eval suite=…` and `k2rl eval compare` do."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec

from envs.coding.judging import judges_end
from k2rl.errors import ConfigError, RunError, StoppedError
from k2rl.evaluation import suite_compare, suite_results
from k2rl.evaluation.policies import Cheat, Gold, Null, Policy
from k2rl.evaluation.suite_episodes import EpisodeCache
from k2rl.evaluation.suite_options import SuiteOptions, parse
from k2rl.evaluation.suite_results import Score, SuiteResults
from k2rl.evaluation.suite_run import SuiteRun
from k2rl.evaluation.suites import ELSEWHERE, Suite, load_suite

FOLDER = Path("outputs/eval")
CACHE = FOLDER / "cache"
PROGRESS_S = 2.0
MOST_TAGS = 24


def compare(words: Sequence[str]) -> str:
    """What to print.

    Raises:
        ConfigError: one line.
    """
    if len(words) != 2:
        raise ConfigError("usage: k2rl eval compare FOLDER FOLDER, each with the results of a suite")
    return suite_compare.as_text(suite_compare.compare(Path(words[0]), Path(words[1])))


def run(words: Sequence[str]) -> str:
    """Evaluate; returns what to print at the end.

    Raises:
        ConfigError: one line; nothing was started.
        RunError: the model is lost, or nothing was scored; a StoppedError on Ctrl-C and SIGTERM.
    """
    options = parse(words)
    suite = load_suite(options)
    scripted = _scripted(options)
    keeps = scripted is None and suite.env not in ELSEWHERE
    use_cache = options.cache == "on" or (options.cache == "auto" and keeps)
    folder = _folder(options)
    results = asyncio.run(
        _evaluate(options, suite, scripted, EpisodeCache(CACHE) if use_cache else None, folder)
    )
    if results.overall.average is None:
        reasons = "; ".join(results.failures) or results.stopped_by or "there were none"
        raise RunError(f"no episode was scored: {reasons}")
    if options.output == "json":
        return json.dumps({"folder": str(folder), **msgspec.to_builtins(results)})
    return as_text(results, folder)


def _folder(options: SuiteOptions) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    folder = Path(options.out).expanduser() if options.out else FOLDER / options.suite / stamp
    try:
        folder.mkdir(parents=True, exist_ok=bool(options.out))
    except OSError as error:
        raise ConfigError(f"out={folder}: {error.strerror}; name another folder with out=") from error
    return folder


def _scripted(options: SuiteOptions) -> Policy | None:
    if options.model == "gold":
        return Gold()
    if options.model == "null":
        return Null()
    if options.model.startswith("cheat:"):
        return Cheat(options.model.removeprefix("cheat:"))
    return None


async def _evaluate(
    options: SuiteOptions, suite: Suite, policy: Policy | None, cache: EpisodeCache | None, folder: Path
) -> SuiteResults:
    work = asyncio.ensure_future(_played(options, suite, policy, cache, folder))
    with _cancelled_by_signal(work):
        await asyncio.wait({work})
    if work.cancelled():
        kept = "; the same command goes on from there" if cache is not None else ""
        raise StoppedError(f"interrupted; {folder} has what was finished{kept}")
    return work.result()


async def _played(
    options: SuiteOptions, suite: Suite, policy: Policy | None, cache: EpisodeCache | None, folder: Path
) -> SuiteResults:
    from k2rl.evaluation.suite_models import open_model

    async with judges_end():
        policy = policy or await open_model(options, folder)
        try:
            run = SuiteRun(suite, options, policy, cache, _Progress())
            try:
                return await run.run()
            finally:
                # What is finished is worth having, however this ends.
                _save(folder, run)
        finally:
            await policy.close()


def _save(folder: Path, run: SuiteRun) -> None:
    from k2rl.evaluation.suite_report import write_report

    results = run.results()
    try:
        suite_results.save(folder, results, run.records)
        write_report(folder, results, run.records)
    except OSError as error:
        raise RunError(f"the results cannot be written to {folder}: {error.strerror}") from error


@contextmanager
def _cancelled_by_signal(work: asyncio.Future[SuiteResults]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM cancels `work`, which then saves; the second ends the process."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def forget() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    def cancel() -> None:
        forget()
        work.cancel()

    for number in numbers:
        loop.add_signal_handler(number, cancel)
    try:
        yield
    finally:
        forget()


class _Progress:
    """A line on stderr now and then."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, done: int, planned: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_S and done < planned:
            self._last = now
            sys.stderr.write(f"… {done} of {planned}\n")


def as_text(results: SuiteResults, folder: Path) -> str:
    """The results for a terminal; the last word is how many tasks are solved, of how many."""
    ks = sorted(results.overall.pass_at)
    header = "".join(f"{f'pass@{k}':>9}" for k in ks)
    lines = [f"{results.suite}, {results.model}: {results.played} of {results.planned} answers"]
    if results.stopped_by:
        lines[0] += f"; no more, for {results.stopped_by} was reached"
    lines.append(f"  {'':<24}{'tasks':>6}{'reward':>9}  95 % interval  {header}{'failed':>8}")
    rows = [("all", results.overall), *list(results.per_tag.items())[:MOST_TAGS]]
    lines += [_row(name, score, ks) for name, score in rows]
    if len(results.per_tag) > MOST_TAGS:
        lines.append(f"  … {len(results.per_tag) - MOST_TAGS} more tags in {suite_results.RESULTS}")
    lines += [f"  failed, {count} times: {reason}" for reason, count in results.failures.items()]
    tokens = f"{results.prompt_tokens:,} prompt and {results.completion_tokens:,} sampled tokens, "
    lines.append(
        f"  {tokens if results.completion_tokens else ''}{results.seconds:.1f} s, {results.reused} reused"
    )
    lines.append(f"  report: {folder / 'report.html'}")
    lines.append(f"{results.suite} {results.model}: {results.fraction}")
    return "\n".join(lines)


def _row(name: str, score: Score, ks: Sequence[int]) -> str:
    if score.average is None:
        blank = " " * (14 + 1 + 9 * len(ks))
        return f"  {name:<24.24}{score.tasks:>6}{'-':>9}{blank}  {score.failed:>8}"
    low, high = score.average.ci95
    passes = "".join(f"{score.pass_at[k].mean:>9.3f}" if k in score.pass_at else f"{'-':>9}" for k in ks)
    interval = f"{low:.3f} to {high:.3f}"
    return f"  {name:<24.24}{score.tasks:>6}{score.average.mean:>9.3f}  {interval}  {passes}{score.failed:>8}"
