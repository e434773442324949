"""The charts of a report: which figures of a run are drawn, and how."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from k2rl.tracking import charts, phases
from k2rl.tracking.metrics import series
from k2rl.tracking.report_data import Run, evaluation_color, evaluation_label, phase_colors, reward_text
from k2rl.tracking.timeline import Phase

RUNNING_MEAN = 5
RUNNING_MEAN_FROM = 20
STEP_ROWS = 40
STRIP_PHASES = 400


@dataclass(frozen=True)
class Figure:
    """A chart with its caption; `legend` holds (colour, label) pairs."""

    title: str
    note: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


def headline_chart(run: Run) -> str:
    """Base model, before RL and the latest evaluation as intervals, with RL's gain shaded."""
    rows = []
    for result in (run.evaluations.get("base"), run.before, run.latest):
        if result is not None and result.estimate is not None:
            failed = f", {result.failed} failed" if result.failed else ""
            label, detail = evaluation_label(result), f"n = {result.n}{failed}"
            rows.append(charts.IntervalRow(label, detail, result.estimate, evaluation_color(result)))
    colors = [row.color for row in rows]
    gain = (len(rows) - 2, len(rows) - 1) if colors[-2:] == ["c-before", "c-after"] else None
    return charts.interval_chart(rows, title="held-out reward with 95 % intervals", gain=gain)


def reward_chart(run: Run) -> Figure:
    """Training reward of each step, with the held-out evaluations and their intervals."""
    rewards = series(run.rows, "reward/mean")
    smooth = len(rewards) > RUNNING_MEAN_FROM
    lines = [charts.Series("training reward", rewards, "c-train", faint=smooth)]
    legend = []
    if smooth:
        lines.append(charts.Series("running mean", running_mean(rewards), "c-train", dots=False))
        legend.append(("c-train", f"training reward of each step, and its mean over {RUNNING_MEAN} steps"))
    elif rewards:
        legend.append(("c-train", "training reward of each step"))
    points = [
        charts.IntervalPoint(result.step, estimate, f"held out, {evaluation_label(result)}")
        for result in run.evaluations.values()
        if result.name != "base" and (estimate := result.estimate) is not None
    ]
    if points:
        held_out = [(point.x, point.estimate.mean) for point in points]
        lines.append(charts.Series("held out", held_out, "c-after", dashed=True, dots=False))
        legend.append(("c-after", "held-out reward with its 95 % interval"))
    svg = charts.line_chart(
        lines, title="reward", intervals=points, from_zero=True, width=1040, height=320, form=reward_text
    )
    return Figure("Reward", "", svg, tuple(legend))


def running_mean(points: Sequence[charts.Point], window: int = RUNNING_MEAN) -> list[charts.Point]:
    """The mean of each point and up to `window - 1` before it."""
    means = []
    for number, (x, _) in enumerate(points):
        recent = [y for _, y in points[max(0, number + 1 - window) : number + 1]]
        means.append((x, sum(recent) / len(recent)))
    return means


@dataclass(frozen=True)
class _Spec:
    metric: str
    title: str
    note: str
    from_zero: bool = False
    percent: bool = False
    whole: bool = False


_SPECS = (
    _Spec(
        "mismatch/mean_abs_gap",
        "Log-prob gap, trainer against vLLM",
        "Mean absolute difference on the sampled tokens, in nats. It should stay small and level.",
        from_zero=True,
    ),
    _Spec("rollout/tokens_mean", "Sampled tokens an episode", "Mean over the step's episodes.", True),
    _Spec(
        "rollout/truncated_share",
        "Cut at the token budget",
        "Share of episodes that ran out of their budget.",
        from_zero=True,
        percent=True,
    ),
    _Spec("rollout/temperature", "Sampling temperature", "As scheduled."),
    _Spec("rollout/tokens_per_second", "Rollout throughput", "Sampled tokens a second.", from_zero=True),
    _Spec("rollout/failed", "Failed episodes", "Left out of the loss and of every mean.", True, whole=True),
    _Spec("train/loss", "Policy loss", ""),
    _Spec("sft/loss", "NLL of the chats it learns from", "Nats a token of the assistant's, in each step."),
    _Spec("eval/nll", "Held-out NLL", "Nats a token: on chats that it never sees. It rises if it overfits."),
    _Spec("sft/grad_norm", "Gradient norm", "Before clipping.", from_zero=True),
    _Spec("sft/lr", "Learning rate", "As scheduled.", from_zero=True),
    _Spec("train/grad_norm", "Gradient norm", "Before clipping.", from_zero=True),
    _Spec("ptx/loss", "PTX loss", "Next-token loss on curated text: it rises if the policy forgets."),
    _Spec(
        "ptx/held_out_nll",
        "NLL of held-out texts",
        "Nats a token: on curated text that it never learns from. It rises if the policy forgets.",
    ),
)


def lines_chart(run: Run, title: str, note: str, metrics: dict[str, str]) -> Figure:
    """Several metrics, given with their labels, in one chart; empty if none was recorded."""
    points = {label: series(run.rows, metric) for metric, label in metrics.items()}
    colors = {label: f"p{number % 11}" for number, label in enumerate(points) if points[label]}
    lines = [charts.Series(label, points[label], color) for label, color in colors.items()]
    svg = charts.line_chart(lines, title=title, from_zero=True, form=reward_text)
    return Figure(title, note, svg, tuple((color, label) for label, color in colors.items()))


def _named(run: Run, prefix: str) -> dict[str, str]:
    """The metrics that begin so, with the rest of their names as labels."""
    names = sorted({name for row in run.rows for name in row if name.startswith(prefix)})
    return {name: name.removeprefix(prefix) for name in names}


def grouped_charts(run: Run) -> list[Figure]:
    """Charts of several lines: reward by kind and by judge."""
    kinds, judges = _named(run, "reward/kind/"), _named(run, "reward/component/")
    figures = [
        *([lines_chart(run, "Training reward by task kind", "", kinds)] if len(kinds) > 1 else []),
        lines_chart(run, "Reward by component", "What the judges name, unweighted.", judges),
    ]
    return [figure for figure in figures if figure.svg]


def critic_charts(run: Run) -> list[Figure]:
    """What the critic gives, whether it is right, and what style alone would earn; empty without one."""
    if not _named(run, "critic/"):
        return []
    values = {
        "reward/component/critic": "critic",
        "critic/first_answers": "the same critic, of the first step's answers",
        "reward/component/verifier": "verifier",
    }
    agreement = {
        "critic/agreement": "held-out pairs of the step",
        "critic/agreement_smoothed": "over the steps",
        "critic/trust": "share of its weight",
    }
    figures = [
        lines_chart(
            run,
            "What critic and verifier give",
            "The rubric's reward beside the truth. A critic that learns has no fixed scale: compare what it "
            "gives to answers of a step and to the first ones.",
            values,
        ),
        lines_chart(
            run,
            "Critic and verifier",
            "How often the two agree (0.5 is chance), and what the critic's reward counts for.",
            agreement,
        ),
        lines_chart(
            run,
            "Bias probes of the critic",
            "What answers would gain by such an addition, on average over right and wrong ones. Below 0 it "
            "costs.",
            _named(run, "critic/bias/"),
        ),
    ]
    return [figure for figure in figures if figure.svg]


def metric_charts(run: Run) -> list[Figure]:
    """The small charts, for those metrics that the run recorded."""
    figures = grouped_charts(run)
    for spec in _SPECS:
        points = series(run.rows, spec.metric)
        svg = charts.line_chart(
            [charts.Series(spec.title, points, "c-train")],
            title=spec.title,
            from_zero=spec.from_zero,
            whole=spec.whole,
            form=percent_text if spec.percent else short_number,
            tick_form=percent_text if spec.percent else charts.plain_number,
        )
        if svg:
            figures.append(Figure(spec.title, spec.note, svg))
    return figures


def short_number(value: float) -> str:
    """Four significant digits, for values on hover."""
    return f"{value:,.4g}"


def percent_text(share: float) -> str:
    """A share in percent: `25 %`, `7.5 %`."""
    return f"{round(100 * share, 1):g} %"


def run_strip(run: Run) -> str:
    """The whole run as one row of phases; empty where they would be too thin to tell apart."""
    if len(run.phases) > STRIP_PHASES:
        return ""
    colors = phase_colors(run.phases)
    bars = [_bar(phase, 0.0, colors) for phase in run.phases]
    return charts.bar_rows([("run", bars)], title="phases of the whole run", row=30)


def step_bars(run: Run) -> Figure:
    """The phases of each step on a row, from the step's start; evenly chosen steps of a long run."""
    by_step: defaultdict[int, list[Phase]] = defaultdict(list)
    for phase in run.phases:
        # What follows a step, evaluations above all, would dwarf it.
        if phase.step > 0 and phase.phase not in phases.AFTER_A_STEP:
            by_step[phase.step].append(phase)
    steps = sorted(by_step)
    stride = -(-len(steps) // STEP_ROWS)
    colors = phase_colors(run.phases)
    rows = []
    for step in steps[:: stride or 1]:
        start = min(phase.start for phase in by_step[step])
        rows.append((f"step {step}", [_bar(phase, start, colors) for phase in by_step[step]]))
    note = f"Every {stride} steps." if stride > 1 else ""
    return Figure("Each step from its start", note, charts.bar_rows(rows, title="phases of each step"))


def _bar(phase: Phase, origin: float, colors: dict[str, str]) -> charts.Bar:
    title = f"{phase.phase}, step {phase.step}: {charts.seconds_text(phase.seconds)}"
    return charts.Bar(phase.start - origin, phase.end - origin, colors[phase.phase], title)
