"""The metrics of a run: one JSON object a step in `metrics.jsonl`, and the sinks that mirror it.

Names are `group/name`. Those that the live view, the summary and the report look for:

| name | meaning |
| --- | --- |
| `reward/mean`, `reward/kind/<kind>` | mean training reward of the scored episodes, also by task kind |
| `reward/component/<name>` | mean of a component of the judge's verdicts, over those that name it |
| `rollout/episodes`, `rollout/failed` | episodes of the step, and those that failed |
| `rollout/tokens_mean`, `rollout/truncated_share` | sampled tokens an episode; share cut at its budget |
| `rollout/context_share` | share that filled `inference.max_model_len` before it was over |
| `rollout/tokens_per_second`, `rollout/episodes_per_second` | throughput of the rollouts |
| `rollout/temperature` | sampling temperature |
| `sft/loss`, `sft/tokens`, `eval/nll` | of `k2rl sft`: training and held-out NLL (nats), learned tokens |
| `train/loss`, `train/grad_norm`, `train/lr`, `ptx/loss` | of the optimizer step |
| `ptx/held_out_nll` | of texts that it never learns from (nats a token); as step 0 before training |
| `train/reference_kl` | with `objective.kl_weight`: estimated KL to the reference, nats a token |
| `qk_clip/max_logit`, `qk_clip/mean_logit` | largest attention logit of all heads; mean of heads' largest |
| `qk_clip/layer_<n>/max_logit`, `…/mean_logit` | the same for each layer |
| `qk_clip/clipped_share` | share of heads that were clipped after the step |
| `router/max_load`, `router/min_load` | busiest and idlest expert's tokens, as a multiple of an equal share |
| `router/unused_share` | share of experts that no token has chosen |
| `mismatch/mean_abs_gap`, `mismatch/max_abs_gap` | trainer against vLLM log-probs, in nats |
| `critic/agreement`, `critic/agreement_smoothed` | with the verifier, on held-out pairs; smoothed |
| `critic/trust` | share of its weight that the critic's reward has |
| `critic/first_answers` | reward that the critic of the step would give to the run's first answers |
| `critic/bias/<probe>` | what answers would gain from the critic for what the probe adds |
| `time/<phase>_s`, `time/step_s` | seconds of each phase and of the step; added by the tracker |

A run may add any others; a name that is missing leaves out its row or chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from k2rl.errors import ConfigError
from k2rl.tracking.jsonl import JsonlWriter, read_jsonl, rewind_jsonl

FILE = "metrics.jsonl"

Metrics = Mapping[str, float]
Row = dict[str, float | None]


class MetricsSink(Protocol):
    """Somewhere else that metrics go."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends one object a step to `metrics.jsonl` in `directory`; each line is synced to disk.

    With `resume_step` the lines of later steps and a torn last line are dropped first.

    Raises:
        ConfigError: if the folder already holds the metrics of a run and `resume_step` is None.
    """

    def __init__(self, directory: Path, resume_step: int | None = None) -> None:
        path = directory / FILE
        if resume_step is not None:
            rewind_jsonl(path, Row, lambda row: (row["step"] or 0) <= resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise ConfigError(f"{directory} holds an earlier run; set resume={directory} or another name")
        self._writer = JsonlWriter(path, append=True)

    def write(self, step: int, metrics: Metrics, wall_seconds: float) -> None:
        """Append the metrics of `step`, `wall_seconds` after the run's start.

        A NaN or infinite value is written as null: it shows that there was none.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self._writer.write({"step": step, "wall_seconds": round(wall_seconds, 3), **values})

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps in `path` (a `metrics.jsonl` or its folder) in order, without the values that are null.

    A file that does not exist has no steps; a torn last line is left out.

    Raises:
        RunError: if a line before the last is damaged.
    """
    rows = read_jsonl(path / FILE if path.is_dir() else path, Row)
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def series(rows: Sequence[Metrics], name: str) -> list[tuple[float, float]]:
    """`(step, value)` of each row that has the metric `name`."""
    return [(row["step"], row[name]) for row in rows if name in row]
