"""Pictures of several runs: charts side by side, a line for each seed, a colour for each arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from k2rl.tracking.charts import Series, line_chart

COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")
WIDTH, HEIGHT = 350, 225

Curve = Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A chart of one number over steps: by arm a curve for each seed."""

    title: str
    curves: Mapping[str, Sequence[Curve]]
    #: Step of the first value.
    first: int = 0
    log: bool = False


def draw(panels: Sequence[Panel], file: Path) -> None:
    """Write them as one SVG; arms are named above, in their colours. At most four arms."""
    arms = list(panels[0].curves)
    style = "svg{font:12px system-ui,sans-serif;background:#fff} .tick{fill:#666} .grid{stroke:#ddd}"
    style += ".line{fill:none;stroke:currentColor;stroke-width:1.5} .dot{fill:currentColor}"
    style += "".join(f".arm{number}{{color:{color}}}" for number, color in enumerate(COLORS))
    between = min(230, WIDTH * len(panels) // len(arms))
    legend = "".join(
        f'<text class="arm{number}" fill="currentColor" x="{12 + between * number}" y="12">'
        f"{escape(name)}</text>"
        for number, name in enumerate(arms)
    )
    charts = "".join(_chart(panel, WIDTH * number) for number, panel in enumerate(panels))
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}">'
        f"<style>{style}</style>{legend}{charts}</svg>\n"
    )


def _chart(panel: Panel, at: int) -> str:
    def height(value: float) -> float:
        return math.log10(max(value, 1e-3)) if panel.log else value

    lines = [
        Series(
            arm,
            [(float(step), height(value)) for step, value in enumerate(curve, start=panel.first)],
            f"arm{number}",
            dots=False,
        )
        for number, (arm, curves) in enumerate(panel.curves.items())
        for curve in curves
    ]
    chart = line_chart(
        lines, title=panel.title, tick_form=(lambda v: f"{10**v:,.3g}") if panel.log else (lambda v: f"{v:g}")
    )
    placed = chart.replace("<svg ", f'<svg x="{at}" y="40" width="340" height="180" ', 1)
    return f'<text x="{at + 12}" y="30">{escape(panel.title)}</text>{placed}'
