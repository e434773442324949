"""Small inline SVG charts for the report.

Colours come from CSS classes (`c-train`, `c-after`, …) through `currentColor`, so one chart serves
light, dark and print. Every mark carries a `<title>`, which browsers show on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from k2rl.evaluation.stats import Estimate

Point = tuple[float, float]
Format = Callable[[float], str]

DOTS_UP_TO = 60
"""Points above which a line has no dots."""


@dataclass(frozen=True)
class Series:
    """A line; `color` is a CSS class."""

    label: str
    points: Sequence[Point]
    color: str
    dashed: bool = False
    faint: bool = False
    dots: bool = True


@dataclass(frozen=True)
class IntervalPoint:
    """A mean with its interval at one x."""

    x: float
    estimate: Estimate
    label: str


@dataclass(frozen=True)
class IntervalRow:
    """One line of an interval chart."""

    label: str
    detail: str
    estimate: Estimate
    color: str


@dataclass(frozen=True)
class Bar:
    """A stretch of time in a row of bars."""

    start: float
    end: float
    color: str
    title: str


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round (or whole) numbers; the first is at most `low`, the last at least `high`."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Multiplying by the step leaves 0.30000000000000004.
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def time_ticks(end: float, count: int = 9) -> list[float]:
    """At most about `count` round times from 0 to `end` seconds."""
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 43200, 86400)
    step = next((step for step in steps if end / step <= count), None)
    if step is None:  # more than a week: whole days
        step = 86400 * math.ceil(end / 86400 / count)
    if end < steps[0]:
        return [tick for tick in nice_ticks(0.0, end, 5) if tick <= end]
    return [float(step * number) for number in range(int(end // step) + 1)]


def plain_number(value: float) -> str:
    """A tick's label: `0.25`, `1,200`, with a true minus sign."""
    return f"{value:,.6g}".replace("-", "\u2212")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    intervals: Sequence[IntervalPoint] = (),
    interval_color: str = "c-after",
    from_zero: bool = False,
    whole: bool = False,
    width: int = 340,
    height: int = 180,
    form: Format = plain_number,
    tick_form: Format = plain_number,
) -> str:
    """Lines over the steps of a run, with evaluations as points with whiskers; empty without any.

    Args:
        whole: the values are counts.
        form: how values read on hover; `tick_form`: on the axis.
    """
    xs = [x for line in series for x, _ in line.points] + [point.x for point in intervals]
    ys = [y for line in series for _, y in line.points]
    ys += [edge for point in intervals for edge in point.estimate.ci95]
    if not xs:
        return ""
    y_ticks = nice_ticks(min([0.0, *ys] if from_zero else ys), max(ys), 4, whole)
    labels = [tick_form(tick) for tick in y_ticks]
    left = 12.0 + 6.6 * max(map(len, labels))
    x = Scale(min(xs), max(max(xs), min(xs) + 1), left, width - 14)
    y = Scale(y_ticks[0], y_ticks[-1], height - 34, 12)
    parts = [_grid(x, y, y_ticks, labels, width), _step_axis(x, height)]
    parts += [_line(line, x, y, form) for line in series if line.points]
    parts += [_whisker(point, x, y, interval_color, form) for point in intervals]
    return _svg(width, height, title, parts)


def _grid(x: Scale, y: Scale, ticks: Sequence[float], labels: Sequence[str], width: int) -> str:
    lines = [
        f'<line class="grid" x1="{x.start}" x2="{width - 8}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text class="tick" x="{x.start - 8}" y="{y(tick) + 4}" text-anchor="end">{escape(label)}</text>'
        for tick, label in zip(ticks, labels, strict=True)
    ]
    return "".join(lines)


def _step_axis(x: Scale, height: int) -> str:
    ticks = [tick for tick in nice_ticks(x.low, x.high, 6, whole=True) if x.low <= tick <= x.high]
    marks = [_tick_below(x(tick), height - 16, plain_number(tick)) for tick in ticks]
    return "".join(marks) + _tick_below((x.start + x.end) / 2, height - 2, "step")


def _tick_below(x: float, y: float, label: str) -> str:
    return f'<text class="tick" x="{x}" y="{y}" text-anchor="middle">{escape(label)}</text>'


def _line(line: Series, x: Scale, y: Scale, form: Format) -> str:
    path = " ".join(f"{x(px)},{y(py)}" for px, py in line.points)
    classes = f"line{' dashed' if line.dashed else ''}{' faint' if line.faint else ''}"
    parts = [f'<polyline class="{classes}" points="{path}"/>']
    if line.dots and len(line.points) <= DOTS_UP_TO:
        parts += [
            f'<circle class="dot{" faint" if line.faint else ""}" cx="{x(px)}" cy="{y(py)}" r="2.6">'
            f"<title>{escape(line.label)}, step {px:g}: {escape(form(py))}</title></circle>"
            for px, py in line.points
        ]
    return f'<g class="{line.color}">{"".join(parts)}</g>'


def _whisker(point: IntervalPoint, x: Scale, y: Scale, color: str, form: Format) -> str:
    px, low, high = x(point.x), *map(y, point.estimate.ci95)
    shown = f"{point.label}: {_estimate_text(point.estimate, form)}"
    return (
        f'<g class="{color}"><title>{escape(shown)}</title>'
        f'<line class="whisker" x1="{px}" x2="{px}" y1="{low}" y2="{high}"/>'
        f'<line class="whisker" x1="{px - 5}" x2="{px + 5}" y1="{low}" y2="{low}"/>'
        f'<line class="whisker" x1="{px - 5}" x2="{px + 5}" y1="{high}" y2="{high}"/>'
        f'<circle class="big dot" cx="{px}" cy="{y(point.estimate.mean)}" r="5"/></g>'
    )


def interval_chart(
    rows: Sequence[IntervalRow],
    *,
    title: str,
    gain: tuple[int, int] | None = None,
    width: int = 640,
    form: Format = plain_number,
) -> str:
    """One mean with its interval a row, on a common axis.

    Args:
        gain: the rows between whose means the difference is shaded and drawn as an arrow.
    """
    if not rows:
        return ""
    row_height, top, left = 54, 4, 124
    height = top + row_height * len(rows) + 26
    edges = [edge for row in rows for edge in row.estimate.ci95]
    ticks = nice_ticks(min(0.0, *edges), max(edges), 5)
    x = Scale(ticks[0], ticks[-1], left, width - 18)
    bottom = top + row_height * len(rows)
    parts = [
        f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="{top}" y2="{bottom}"/>'
        + _tick_below(x(t), bottom + 17, form(t))
        for t in ticks
    ]
    middles = [top + row_height * (number + 0.5) for number in range(len(rows))]
    if gain is not None:
        start, end = (x(rows[row].estimate.mean) for row in gain)
        parts.append(_gain_band(start, end, middles[gain[0]], middles[gain[1]]))
    parts += [_interval_row(row, x, middle, form) for row, middle in zip(rows, middles, strict=True)]
    return _svg(width, height, title, parts)


def _gain_band(start: float, end: float, top: float, bottom: float) -> str:
    # The arrow runs level with the lower mean and stops short of its dot.
    direction = 1 if end >= start else -1
    tip = end - 10 * direction
    arrow = ""
    if abs(end - start) > 26:
        arrow = (
            f'<line class="arrow" x1="{start}" x2="{tip - 5 * direction}" y1="{bottom}" y2="{bottom}"/>'
            f'<path class="arrowhead" d="M{tip} {bottom} l{-7 * direction} -4 v8 z"/>'
        )
    return (
        f'<g class="c-after"><rect class="band" x="{min(start, end)}" y="{top}" width="{abs(end - start)}" '
        f'height="{bottom - top}"/><line class="drop" x1="{start}" x2="{start}" y1="{top}" y2="{bottom}"/>'
        f"{arrow}</g>"
    )


def _estimate_text(estimate: Estimate, form: Format) -> str:
    low, high = estimate.ci95
    return f"{form(estimate.mean)} [{form(low)}, {form(high)}]"


def _interval_row(row: IntervalRow, x: Scale, y: float, form: Format) -> str:
    low, high = map(x, row.estimate.ci95)
    shown = f"{row.label}: {_estimate_text(row.estimate, form)}, {row.detail}"
    return (
        f'<g class="{row.color}"><title>{escape(shown)}</title>'
        f'<text class="row-label" x="0" y="{y - 2}">{escape(row.label)}</text>'
        f'<text class="tick" x="0" y="{y + 13}">{escape(row.detail)}</text>'
        f'<rect class="interval" x="{low}" width="{max(1.0, high - low)}" y="{y - 5}" height="10" rx="5"/>'
        f'<circle class="big dot" cx="{x(row.estimate.mean)}" cy="{y}" r="6.5"/></g>'
    )


def range_pair(rows: Sequence[tuple[str, str, Estimate | None]], low: float, high: float) -> str:
    """Intervals, given as (label, colour, estimate), above each other on a bare axis, for a table's cell."""
    width, row = 220, 15
    height = row * len(rows)
    x = Scale(low, high if high > low else low + 1, 6, width - 6)
    parts = [f'<line class="grid" x1="6" x2="{width - 6}" y1="{height / 2}" y2="{height / 2}"/>']
    for number, (label, color, estimate) in enumerate(rows):
        if estimate is None:
            continue
        start, end, y = x(estimate.ci95[0]), x(estimate.ci95[1]), row * (number + 0.5)
        parts.append(
            f'<g class="{color}"><title>{escape(label)}</title>'
            f'<rect class="interval" x="{start}" width="{max(1.0, end - start)}" y="{y - 3}" '
            f'height="6" rx="3"/>'
            f'<circle class="dot" cx="{x(estimate.mean)}" cy="{y}" r="4"/></g>'
        )
    return _svg(width, height, "before and after with 95 % intervals", parts)


def bar_rows(
    rows: Sequence[tuple[str, Sequence[Bar]]], *, title: str, width: int = 1040, row: int = 16
) -> str:
    """Rows of bars over seconds, like a Gantt chart; each row has its label at the left."""
    ends = [bar.end for _, bars in rows for bar in bars]
    if not ends or max(ends) <= 0:
        return ""
    left = 16.0 + 6.6 * max(len(label) for label, _ in rows)
    x = Scale(0.0, max(ends), left, width - 30)
    bottom = row * len(rows) + 4
    ticks = time_ticks(max(ends))
    parts = [
        f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="0" y2="{bottom}"/>'
        + _tick_below(x(t), bottom + 15, seconds_text(t))
        for t in ticks
    ]
    for number, (label, bars) in enumerate(rows):
        top = number * row + 2
        text = f'<text class="tick" x="{left - 8}" y="{top + row / 2 + 3}" text-anchor="end">'
        parts.append(f"{text}{escape(label)}</text>")
        parts += [_bar(bar, x, top, row - 3) for bar in bars]
    return _svg(width, bottom + 22, title, parts)


def _bar(bar: Bar, x: Scale, top: float, height: float) -> str:
    start, end = x(bar.start), x(bar.end)
    return (
        f'<rect class="bar {bar.color}" x="{start}" width="{max(0.5, round(end - start, 2))}" y="{top}" '
        f'height="{height}" rx="1.5"><title>{escape(bar.title)}</title></rect>'
    )


def seconds_text(seconds: float) -> str:
    """`45 s`, `2 min`, `1 h 5 min`: a duration as people say it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60, 1)
    if minutes < 60:
        return f"{minutes:g} min"
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'class="{"broad" if width > 800 else ""}" style="max-width:{width}px">{"".join(parts)}</svg>'
    )
