"""What the live view shows: its state, and how that is drawn with rich."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from k2rl.evaluation.results import EvaluationResult
from k2rl.tracking.metrics import Metrics

SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 30
MAX_WIDTH = 96
RECENT_STEPS = 5
NOTES_SHOWN = 3


@dataclass
class PanelState:
    """All that the panel shows; `done_steps` were done before a resume."""

    name: str
    total_steps: int
    clock: Callable[[], float]
    step: int = 0
    began: float = 0.0
    phase: str = "start"
    phase_step: int = 0
    phase_began: float = 0.0
    step_began: float | None = None
    progress: tuple[int, int] | None = None
    metrics: Metrics = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    evaluations: dict[str, EvaluationResult] = field(default_factory=dict)
    notes: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=NOTES_SHOWN))
    stopped: bool = False

    @property
    def elapsed(self) -> float:
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the end at the pace of recent steps; None before the first is done."""
        if not self.step_seconds:
            return None
        pace = sum(self.step_seconds) / len(self.step_seconds)
        into_step = min(pace, self.clock() - self.step_began) if self.step_began is not None else 0.0
        return max(0.0, pace * (self.total_steps - self.step) - into_step)

    @property
    def recent_reward(self) -> float:
        """Mean reward of the last few steps; there is at least one."""
        recent = self.rewards[-RECENT_STEPS:]
        return sum(recent) / len(recent)

    def enter_phase(self, name: str, step: int) -> None:
        self.phase, self.phase_step, self.progress = name, step, None
        self.phase_began = self.clock()
        if step > self.step and self.step_began is None:
            self.step_began = self.phase_began

    def finish_step(self, step: int, metrics: Metrics) -> None:
        self.step, self.metrics, self.step_began = step, metrics, None
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])
        if "time/step_s" in metrics:
            self.step_seconds.append(metrics["time/step_s"])


def render_panel(state: PanelState, width: int) -> RenderableType:
    """The whole panel, for a terminal of `width` columns."""
    parts: list[RenderableType] = [_bars(state)]
    facts = _facts(state)
    if facts.row_count:
        parts.append(Padding(facts, (1, 0, 0, 0)))
    if state.notes:
        notes = [
            Text.assemble((f"! {clock_text(at):>7}  ", "yellow"), text, overflow="ellipsis", no_wrap=True)
            for at, text in state.notes
        ]
        parts.append(Padding(Group(*notes), (1, 0, 0, 0)))
    title = Text.assemble(("k2rl", "bold cyan"), " · ", (state.name, "bold"))
    body = Group(*parts)
    return Panel(body, title=title, title_align="left", width=min(width, MAX_WIDTH), border_style="dim")


def _bars(state: PanelState) -> Table:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(width=12, no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, min_width=22)
    left = state.seconds_left
    remaining = "" if left is None or state.stopped else f" · {clock_text(left)} left"
    table.add_row(
        Text("steps", "bold"),
        ProgressBar(total=max(1, state.total_steps), completed=state.step, complete_style="cyan"),
        f"{state.step}/{state.total_steps}",
        Text.assemble((clock_text(state.elapsed), "bold"), (remaining, "dim")),
    )
    if not state.stopped:
        done, total = state.progress or (0, 0)
        table.add_row(
            Text(state.phase, "green"),
            ProgressBar(total=max(1, total), completed=done, complete_style="green") if total else Text(""),
            f"{done}/{total}" if total else "",
            Text(clock_text(state.clock() - state.phase_began), "dim"),
        )
    return table


def _facts(state: PanelState) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=12, style="dim", no_wrap=True)
    table.add_column()
    if state.rewards:
        table.add_row("reward", _reward_text(state))
    for row, result in enumerate(_shown_evaluations(state)):
        table.add_row("" if row else "held out", _evaluation_line(result))
    for label, line in (
        ("throughput", _throughput_text(state.metrics)),
        ("episodes", _episodes_text(state.metrics)),
        ("policy", _policy_text(state.metrics)),
    ):
        if line:
            table.add_row(label, line)
    return table


def _shown_evaluations(state: PanelState) -> list[EvaluationResult]:
    """Where the run came from and where it is: the reference and the latest evaluation."""
    results = list(state.evaluations.values())
    reference = state.evaluations.get("before") or (results[0] if results else None)
    return [r for r in (reference, results[-1] if results else None) if r is not None][: min(2, len(results))]


def _reward_text(state: PanelState) -> Text:
    text = Text.assemble((f"{state.rewards[-1]:.3f}", "bold"))
    if len(state.rewards) > 1:
        change = state.rewards[-1] - state.rewards[-2]
        arrow, style = ("▲", "green") if change > 0 else ("▼", "red") if change < 0 else ("=", "dim")
        text.append(f" {arrow} {abs(change):.3f}", style)
        text.append(f"   last {min(RECENT_STEPS, len(state.rewards))} ", "dim")
        text.append(f"{state.recent_reward:.3f}   ")
        text.append(sparkline(state.rewards), "cyan")
    return text


def _evaluation_line(result: EvaluationResult) -> Text:
    line = Text(evaluation_text(result))
    line.highlight_regex(r"(?<=: )\d\S*", "bold")
    return line


def _throughput_text(metrics: Metrics) -> str:
    parts = [
        f"{metrics[name]:,.{digits}f} {unit}"
        for name, digits, unit in (
            ("rollout/tokens_per_second", 0, "tokens/s"),
            ("rollout/episodes_per_second", 2, "episodes/s"),
            ("time/step_s", 1, "s a step"),
        )
        if name in metrics
    ]
    return " · ".join(parts)


def _episodes_text(metrics: Metrics) -> Text:
    text = Text()
    if "rollout/episodes" in metrics:
        text.append(f"{metrics['rollout/episodes']:.0f}")
    if "rollout/tokens_mean" in metrics:
        text.append(f" · {metrics['rollout/tokens_mean']:.0f} tokens each")
    if "rollout/truncated_share" in metrics:
        text.append(f" · {metrics['rollout/truncated_share']:.0%} cut at the budget")
    if metrics.get("rollout/failed", 0) > 0:
        text.append(f" · {metrics['rollout/failed']:.0f} failed", "red")
    return text


def _policy_text(metrics: Metrics) -> str:
    parts = [
        f"{label} {metrics[name]:{spec}}{unit}"
        for name, label, spec, unit in (
            ("mismatch/mean_abs_gap", "log-prob gap", ".4f", " nats"),
            ("rollout/temperature", "temperature", ".2f", ""),
            ("train/loss", "loss", ".4g", ""),
            ("sft/loss", "NLL", ".3f", ""),
            ("eval/nll", "held-out NLL", ".3f", ""),
            ("ptx/held_out_nll", "held-out NLL", ".3f", ""),
        )
        if name in metrics
    ]
    return " · ".join(parts)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """`values` as block characters between their minimum and maximum; the last `width` of them."""
    recent = values[-width:]
    low, high = min(recent), max(recent)
    if high == low:
        return SPARKS[len(SPARKS) // 2] * len(recent)
    top = len(SPARKS) - 1
    return "".join(SPARKS[round((value - low) / (high - low) * top)] for value in recent)


def clock_text(seconds: float) -> str:
    """`75` as `1:15`, with hours when there are any."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def evaluation_text(result: EvaluationResult) -> str:
    """`before: 0.125 [0.078, 0.193], n = 128` and what failed."""
    name = f"step {result.step}" if result.name.startswith("step_") else result.name
    failed = f", {result.failed} failed" if result.failed else ""
    if result.reward is None or result.ci95 is None:
        return f"{name}: nothing scored{failed}"
    low, high = result.ci95
    return f"{name}: {result.reward:.3f} [{low:.3f}, {high:.3f}], n = {result.n}{failed}"


def step_text(state: PanelState) -> str:
    """The finished step as one plain line."""
    parts = [f"step {state.step:>{len(str(state.total_steps))}}/{state.total_steps}"]
    if state.rewards:
        parts.append(f"reward {state.rewards[-1]:.3f} (last {RECENT_STEPS}: {state.recent_reward:.3f})")
    if throughput := _throughput_text(state.metrics):
        parts.append(throughput)
    if episodes := _episodes_text(state.metrics):
        parts.append(f"episodes {episodes.plain}")
    for name, label, spec in (
        ("mismatch/mean_abs_gap", "log-prob gap", ".4f"),
        ("sft/loss", "NLL", ".3f"),
        ("eval/nll", "held-out NLL", ".3f"),
    ):
        if name in state.metrics:
            parts.append(f"{label} {state.metrics[name]:{spec}}")
    parts.append(f"{clock_text(state.elapsed)} elapsed")
    if state.seconds_left is not None:
        parts.append(f"{clock_text(state.seconds_left)} left")
    return "  ".join(parts)
