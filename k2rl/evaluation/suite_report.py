"""The page of an evaluation of a suite: one self-contained HTML file, in the look of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from k2rl.evaluation.suite_episodes import EpisodeRecord
from k2rl.evaluation.suite_results import SuiteResults
from k2rl.tracking import charts
from k2rl.tracking.report_examples import Bubble, bubble
from k2rl.tracking.samples import visible

FILE = "report.html"
EXAMPLES = 12
TAGS = 20


@dataclass(frozen=True)
class Shown:
    """An episode, ready to show."""

    record: EpisodeRecord
    outcome: str
    bubbles: tuple[Bubble, ...]


def write_report(folder: Path, results: SuiteResults, records: Sequence[EpisodeRecord]) -> Path:
    """Write `report.html`; everything that a model wrote is escaped."""
    path = folder / FILE
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(render(results, records), encoding="utf-8", errors="xmlcharrefreplace")
    unfinished.replace(path)
    return path


def render(results: SuiteResults, records: Sequence[EpisodeRecord]) -> str:
    """The page as HTML."""
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (here.parent / "tracking" / "report.css").read_text(encoding="utf-8")
    return environment.get_template("suite_report.html.j2").render(
        results=results,
        style=Markup(style),
        chart=Markup(_chart(results)),
        tiles=_tiles(results),
        examples=[_shown(record) for record in chosen(records, EXAMPLES)],
    )


def chosen(records: Sequence[EpisodeRecord], count: int) -> list[EpisodeRecord]:
    """In turn from those solved, not solved and failed, evenly spaced among each."""
    groups = [
        [record for record in records if record.solved],
        [record for record in records if record.reward is not None and not record.solved],
        [record for record in records if record.reward is None],
    ]
    groups = [group for group in groups if group]
    each = -(-count // max(1, len(groups)))
    picked = [[group[i * len(group) // each] for i in range(min(each, len(group)))] for group in groups]
    rounds = [group[i] for i in range(each) for group in picked if i < len(group)]
    return rounds[:count]


def _shown(record: EpisodeRecord) -> Shown:
    outcome = "failed" if record.reward is None else f"{record.reward:.2f}"
    return Shown(record, outcome, tuple(bubble(message) for message in record.messages))


def _chart(results: SuiteResults) -> str:
    rows = [
        charts.IntervalRow(
            name, f"n = {score.tasks}", score.average, "c-after" if name == "all" else "c-train"
        )
        for name, score in [("all", results.overall), *list(results.per_tag.items())[:TAGS]]
        if score.average is not None
    ]
    return charts.interval_chart(rows, title="mean reward with 95 % intervals")


def _tiles(results: SuiteResults) -> list[tuple[str, str, str]]:
    tiles = [(results.fraction, "", "tasks solved")]
    tiles += [(f"{value.mean:.3f}", "", f"pass@{k}") for k, value in sorted(results.overall.pass_at.items())]
    tiles += [
        (f"{results.overall.failed}", "", "answers without a score"),
        (f"{results.completion_tokens:,}", "", "sampled tokens"),
        (charts.seconds_text(results.seconds), "", "in all"),
    ]
    return tiles
