"""One self-contained HTML page that tells a run: `python -m k2rl.tracking.report RUN_DIR`.

The page comes from the files of the run's folder alone, at any time of the run, and needs no
network, script or other file. Everything that a model, environment or user wrote is escaped: the
template escapes by default, and only our own charts pass as markup.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jinja2
from markupsafe import Markup

from k2rl.tracking import report_charts, report_data
from k2rl.tracking.charts import seconds_text
from k2rl.tracking.report_data import Run, evaluation_color, evaluation_label, load_run
from k2rl.tracking.report_examples import Examples, build_examples
from k2rl.tracking.samples import visible

FILE = "report.html"
HERE = Path(__file__).parent
EXAMPLES_SHOWN = 6


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir`, whether the run is finished or not, and return its path."""
    path = run_dir / FILE
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(render_report(load_run(run_dir)), encoding="utf-8", errors="xmlcharrefreplace")
    unfinished.replace(path)
    return path


def render_report(run: Run) -> str:
    """The page as HTML."""
    return _template().render(
        run=run,
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        status=status_text(run),
        base=run.evaluations.get("base"),
        gain=report_data.rl_gain(run),
        imitates=report_data.imitates(run),
        headline_chart=report_charts.headline_chart(run),
        tiles=tiles(run),
        reward=report_charts.reward_chart(run),
        kinds=report_data.kind_rows(run),
        critic=report_charts.critic_charts(run),
        figures=report_charts.metric_charts(run),
        phases=report_data.phase_rows(run),
        run_strip=report_charts.run_strip(run),
        step_bars=report_charts.step_bars(run),
        examples=examples(run),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_without_control_characters,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "reward": report_data.reward_text,
        "signed": report_data.signed_text,
        "seconds": seconds_text,
        "percent": lambda share: f"{100 * share:.1f} %",
        "svg": Markup,
        "label": evaluation_label,
    }
    return environment.get_template("report.html.j2")


def _without_control_characters(value: object) -> object:
    """What the template shows, with control characters escaped as HTML cannot hold them."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def status_text(run: Run) -> str:
    """How far the run came."""
    done, planned = run.summary.steps, run.planned_steps
    if "after" in run.evaluations or (report_data.imitates(run) and done == planned):
        return f"finished after {done} steps"
    of = f" of {planned}" if planned else ""
    return f"not finished: {done}{of} steps so far"


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The run at a glance: (value, unit, label)."""
    summary = run.summary
    imitates = report_data.imitates(run)
    shown = [
        (f"{summary.steps}", "", "supervised steps" if imitates else "RL steps"),
        (seconds_text(summary.wall_seconds), "", "in all"),
    ]
    if imitates:
        tokens = sum(row.get("sft/tokens", 0.0) for row in run.rows)
        shown.append((f"{tokens:,.0f}", "", "tokens learned from"))
    else:
        shown += [
            (f"{summary.samples_per_second:.2f}", "/s", "episodes, training included"),
            (f"{summary.failed_episodes}", "", "failed episodes"),
        ]
    for name, spec, unit, label in (
        ("rollout/tokens_per_second", ",.0f", "/s", "sampled tokens in rollouts"),
        ("mismatch/mean_abs_gap", ".4f", " nats", "log-prob gap to vLLM"),
    ):
        values = [row[name] for row in run.rows if name in row]
        if values:
            shown.append((f"{sum(values) / len(values):{spec}}", unit, f"{label}, mean"))
    return shown


def examples(run: Run) -> Examples:
    """The same held-out tasks before RL and at the latest evaluation; one side if there is only one."""
    results = [r for r in (run.before or run.evaluations.get("base"), run.latest) if r is not None]
    sides = [(evaluation_label(result), evaluation_color(result), result) for result in results]
    return build_examples(sides, EXAMPLES_SHOWN)


def main(arguments: list[str]) -> int:
    """Write the report of the run folder named on the command line; returns the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write("usage: python -m k2rl.tracking.report RUN_DIR (the folder of a run)\n")
        return 2
    sys.stdout.write(f"{write_report(Path(arguments[0]))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
