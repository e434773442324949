"""What a report says, worked out from the files of a run folder; `report.py` only lays it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from k2rl.evaluation.results import EvaluationResult, KindResult, load_results, reward_gain
from k2rl.evaluation.stats import Estimate, difference_ci95
from k2rl.tracking import charts, phases
from k2rl.tracking.jsonl import read_jsonl
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.summary import Summary, read_config, summarise_run
from k2rl.tracking.timeline import Phase, read_timeline, sum_per_phase
from k2rl.tracking.versions import read_versions

PHASE_COLORS = {name: f"p{number}" for number, name in enumerate(phases.ALL)}


class Note(msgspec.Struct, frozen=True):
    """A warning of the run."""

    wall_seconds: float
    text: str


@dataclass(frozen=True)
class Run:
    """All that is known of a run from its folder."""

    folder: str
    summary: Summary
    config: Mapping[str, Any]
    config_text: str
    versions: dict[str, str]
    rows: list[dict[str, float]]
    phases: list[Phase]
    evaluations: dict[str, EvaluationResult]
    notes: list[Note]

    @property
    def title(self) -> str:
        """The configuration's name and when the run began, as far as they are known."""
        name, started = self.config.get("name"), self.versions.get("started", "")
        parts = [str(name) if name else self.folder, started[:16].replace("T", " ")]
        return " · ".join(part for part in parts if part)

    @property
    def planned_steps(self) -> int | None:
        steps = self.config.get("train", {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def before(self) -> EvaluationResult | None:
        """The evaluation directly before RL."""
        return self.evaluations.get("before")

    @property
    def latest(self) -> EvaluationResult | None:
        """The evaluation after RL, or the last one on the way there; None before the first."""
        during = [result for result in self.evaluations.values() if result.step > 0]
        return self.evaluations.get("after") or (during[-1] if during else None)


def load_run(run_dir: Path) -> Run:
    """Read a run folder; files that are not there yet count as empty."""
    config_file = run_dir / "config.yaml"
    return Run(
        folder=run_dir.resolve().name,
        summary=summarise_run(run_dir),
        config=read_config(run_dir),
        config_text=config_file.read_text(encoding="utf-8") if config_file.exists() else "",
        versions=read_versions(run_dir),
        rows=read_metrics(run_dir),
        phases=read_timeline(run_dir),
        evaluations=load_results(run_dir),
        notes=read_jsonl(run_dir / "notes.jsonl", Note),
    )


def reward_text(value: float) -> str:
    """Three decimals, with a true minus sign."""
    return f"{value:.3f}".replace("-", "\u2212")


def signed_text(value: float) -> str:
    """Three decimals, always with a sign."""
    return f"{value:+.3f}".replace("-", "\u2212")


def evaluation_label(result: EvaluationResult) -> str:
    """The evaluation's name as a person says it."""
    names = {"base": "base model", "before": "before RL", "after": "after RL"}
    return names.get(result.name) or f"after {result.step} steps"


def evaluation_color(result: EvaluationResult) -> str:
    return f"c-{result.name}" if result.name in ("base", "before") else "c-after"


def imitates(run: Run) -> bool:
    """Whether it is one of `k2rl sft`, which has no rewards."""
    return run.config.get("data", {}).get("path") is not None


@dataclass(frozen=True)
class Gain:
    """`after` minus `before`; `clear` if the interval leaves out 0."""

    before: Estimate
    after: Estimate
    difference: Estimate

    @property
    def clear(self) -> bool:
        low, high = self.difference.ci95
        return low > 0 or high < 0


def rl_gain(run: Run) -> Gain | None:
    """What RL has added so far; None until there is an evaluation before it and one later."""
    before = run.before.estimate if run.before else None
    after = run.latest.estimate if run.latest else None
    difference = reward_gain(run.before, run.latest)
    if before is None or after is None or difference is None:
        return None
    return Gain(before, after, difference)


@dataclass(frozen=True)
class KindRow:
    """One task kind before and after; a side is None where nothing was scored."""

    kind: str
    before: KindResult | None
    after: KindResult | None
    gain: Estimate | None
    chart: str


def kind_rows(run: Run) -> list[KindRow]:
    """The held-out reward of each task kind before RL and at the latest evaluation."""
    before = run.before.per_kind if run.before else {}
    after = run.latest.per_kind if run.latest else {}
    edges = [edge for kind in (*before.values(), *after.values()) for edge in kind.ci95 or ()]
    low, high = min([0.0, *edges]), max(edges, default=1.0)
    rows = []
    for kind in sorted({*before, *after}):
        old, new = before.get(kind), after.get(kind)
        left, right = kind_estimate(old), kind_estimate(new)
        gain = difference_ci95(left, right) if left is not None and right is not None else None
        chart = charts.range_pair([("before", "c-before", left), ("after", "c-after", right)], low, high)
        rows.append(KindRow(kind, old, new, gain, chart))
    return rows


def kind_estimate(kind: KindResult | None) -> Estimate | None:
    """The kind's mean as an estimate; None if nothing was scored."""
    if kind is None or kind.reward is None or kind.ci95 is None:
        return None
    return Estimate(kind.reward, kind.ci95, kind.n)


@dataclass(frozen=True)
class PhaseRow:
    """The time that one phase took in the whole run."""

    name: str
    color: str
    seconds: float
    share: float


def phase_rows(run: Run) -> list[PhaseRow]:
    """Where the run's time went, longest first; what no phase covers is `other`."""
    totals = sum_per_phase(run.phases)
    covered, wall = sum(totals.values()), run.summary.wall_seconds
    colors = phase_colors(run.phases)
    rows = [(name, colors[name], seconds) for name, seconds in totals.items()]
    if wall - covered > 0.01 * wall:
        rows.append(("other", "p-other", wall - covered))
    whole = max(wall, covered)
    return [
        PhaseRow(name, color, seconds, seconds / whole)
        for name, color, seconds in sorted(rows, key=lambda row: -row[2])
        if seconds > 0
    ]


def phase_colors(recorded: Sequence[Phase]) -> dict[str, str]:
    """A CSS class for each phase: the known ones always the same, others in turn."""
    colors = {phase.phase: PHASE_COLORS.get(phase.phase, "") for phase in recorded}
    unknown = [name for name, color in colors.items() if not color]
    return colors | {name: f"p{(len(PHASE_COLORS) + number) % 11}" for number, name in enumerate(unknown)}
