"""A simulated push for people: a table with a timeline for the terminal, and a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from k2rl.checkpoint_engine.simulator import Simulation
from k2rl.planning import GIB, Planned
from k2rl.tracking.charts import Bar, bar_rows

#: Characters of the terminal's timeline.
COLUMNS = 64
#: Gaps narrower than this share of the push are not drawn.
FINEST = 1e-5
#: Buckets in the picture's second part.
CLOSE_UP = 8
SHADES = " ░▒▓█"

STAGE_COLORS = {"scan": "p7", "copy_in": "p1", "transfer": "p0", "wait": "p4", "apply": "p2"}
BUCKET_COLORS = ("p0", "p1", "p2", "p3", "p5", "p9", "p7", "p8")
STYLE = """
.p0{color:#3b6fd4}.p1{color:#e0912f}.p2{color:#1f9d8b}.p3{color:#a45bc4}.p4{color:#8a94a3}
.p5{color:#d9668f}.p7{color:#7d9a3c}.p8{color:#c2553f}.p9{color:#4aa3c7}
text{font:12px system-ui,"Segoe UI","Liberation Sans",sans-serif;fill:#1b1f24}
.tick{fill:#667080;font-size:11.5px}.h1{font-size:18px;font-weight:700}.h2{font-size:14px;font-weight:600}
.grid{stroke:#e3e5e8;stroke-width:1}.bar{fill:currentColor}
"""


def as_text(planned: Planned) -> str:
    """The table; every line that says how long says that it is simulated, or is under one that does."""
    request, simulation = planned.request, planned.simulation
    total = simulation.seconds
    arena = simulation.plan.arena_bytes / GIB
    lines = [
        f"Simulated push, {headline(planned)}",
        "",
        f"  {'stage':<10}{'busy':>9}  of the push",
        *(
            f"  {stage:<10}{seconds:>7.2f} s  {seconds / total:>4.0%} {'█' * round(20 * seconds / total)}"
            for stage, seconds in simulation.stages.items()
        ),
        "",
        f"  {'total':<10}{total:>7.2f} s  simulated",
        f"  {'floor':<10}{simulation.floor_seconds:>7.2f} s  {simulation.floor_by}; the push takes "
        f"{total / simulation.floor_seconds:.2f} times that",
        f"  {'binds':<10}{simulation.binds_seconds:>7.2f} s  {simulation.binds}",
        f"  {'buckets':<10}{len(simulation.plan.buckets):>7,}    {arena:.1f} GiB of buffers on each rank"
        + (f", {request.slots} buckets in turn" if request.slots else ", the whole version"),
        "",
        "  timeline (simulated; a stage's busiest lane, darker: busier)",
    ]
    lines += [f"  {label:<10}|{bar}|" for label, bar in _text_rows(simulation)]
    lines.append(f"  {'':<10} 0 s{f'{total:.2f} s':>{COLUMNS - 3}}")
    return "\n".join(lines)


def headline(planned: Planned) -> str:
    """What is pushed where, in one line."""
    request = planned.request
    nbytes = sum(spec.nbytes for spec in planned.specs)
    hosts = request.gpus // planned.device.per_host
    ranks = f"{request.gpus:,} ranks on {hosts:,} host{'' if hosts == 1 else 's'}"
    parallel = f"tp={request.tp}" + (f" ep={request.ep}" if request.ep > 1 else "")
    return (
        f"{request.strategy}: {request.model} {request.dtype}, {nbytes / 1e9:,.0f} GB in "
        f"{len(planned.specs):,} tensors, {ranks} of {request.cluster}, {parallel}"
    )


def as_svg(planned: Planned) -> str:
    """The push from beginning to end, and its first buckets close up."""
    simulation = planned.simulation
    close = [
        span.done
        for task, span in zip(simulation.tasks, simulation.spans, strict=True)
        if 0 <= task.bucket < CLOSE_UP
    ]
    ratio = simulation.seconds / simulation.floor_seconds
    summary = (
        f"{simulation.seconds:.2f} s (simulated); floor {simulation.floor_seconds:.2f} s by "
        f"{simulation.floor_by}, {ratio:.2f} times that; binds: {simulation.binds}"
    )
    parts = [
        _text(30, "h1", f"Simulated push, {planned.request.strategy}"),
        _text(52, "tick", headline(planned)),
    ]
    parts.append(_text(72, "tick", summary))
    height = 100
    for title, rows in (
        ("The whole push: the busiest lane of each stage", _bars(simulation, None)),
        (f"Its first {CLOSE_UP} buckets, a colour each", _bars(simulation, max(close, default=0.0))),
    ):
        chart = bar_rows(rows, title=title, row=26)
        tall = re.search(r'viewBox="0 0 \d+ (\d+)', chart)
        if tall is None:
            continue
        parts.append(_text(height + 14, "h2", title))
        place = f'<svg x="24" y="{height + 28}" width="1040" height="{tall[1]}" '
        parts.append(chart.replace("<svg ", place, 1))
        height += int(tall[1]) + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1088 {height}" width="1088" height="{height}">'
        f'<style>{STYLE}</style><rect width="1088" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _text(y: int, kind: str, text: str) -> str:
    return f'<text class="{kind}" x="24" y="{y}">{escape(text)}</text>'


def _lanes(simulation: Simulation) -> list[tuple[str, str, list[int]]]:
    """Of each stage and kind of lane the busiest: a label, the stage and the numbers of its tasks."""
    lanes: dict[tuple[str, str], list[int]] = {}
    for number, task in enumerate(simulation.tasks):
        lanes.setdefault((task.stage, task.lane), []).append(number)
    busiest: dict[tuple[str, str], tuple[float, list[int]]] = {}
    for (stage, lane), numbers in lanes.items():
        busy = sum(simulation.spans[number].end - simulation.spans[number].start for number in numbers)
        kind = (stage, lane.split()[0])
        if kind not in busiest or busy > busiest[kind][0]:
            busiest[kind] = (busy, numbers)
    several = {stage for stage, _ in busiest if sum(other == stage for other, _ in busiest) > 1}
    order = list(STAGE_COLORS)
    return [
        (f"{stage}: {kind}" if stage in several else stage, stage, numbers)
        for (stage, kind), (_, numbers) in sorted(busiest.items(), key=lambda item: order.index(item[0][0]))
    ]


def _bars(simulation: Simulation, until: float | None) -> list[tuple[str, Sequence[Bar]]]:
    """Rows for the chart: all of it in the colours of the stages, or the first seconds by bucket."""
    rows: list[tuple[str, Sequence[Bar]]] = []
    for label, stage, numbers in _lanes(simulation):
        bars: list[Bar] = []
        for number in numbers:
            span, bucket = simulation.spans[number], simulation.tasks[number].bucket
            if until is not None:
                if 0 <= bucket < CLOSE_UP and span.end > span.start:
                    color = BUCKET_COLORS[bucket % len(BUCKET_COLORS)]
                    bars.append(Bar(span.start, span.end, color, _title(stage, bucket, span.start, span.end)))
            elif bars and span.start - bars[-1].end < simulation.seconds * FINEST:
                bars[-1] = Bar(bars[-1].start, span.end, bars[-1].color, bars[-1].title)
            else:
                title = f"{stage} (simulated)"
                bars.append(Bar(span.start, span.end, STAGE_COLORS[stage], title))
        rows.append((label, bars))
    return rows


def _title(stage: str, bucket: int, start: float, end: float) -> str:
    return f"bucket {bucket}, {stage}: {start * 1e3:.2f} to {end * 1e3:.2f} ms (simulated)"


def _text_rows(simulation: Simulation) -> list[tuple[str, str]]:
    rows = []
    width = simulation.seconds / COLUMNS
    for label, _, numbers in _lanes(simulation):
        filled = [0.0] * COLUMNS
        for number in numbers:
            span = simulation.spans[number]
            for column in range(int(span.start / width), min(int(span.end / width), COLUMNS - 1) + 1):
                overlap = min(span.end, (column + 1) * width) - max(span.start, column * width)
                filled[column] += max(0.0, overlap)
        shades = [SHADES[min(4, -int(-4 * min(1.0, share / width) // 1))] for share in filled]
        rows.append((label.split(": ")[-1], "".join(shades)))
    return rows
