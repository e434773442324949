"""The numbers a run comes down to: `summary.json`, worked out from the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import OmegaConf

from k2rl.evaluation.results import EvaluationResult, KindResult, load_results, reward_gain
from k2rl.evaluation.stats import Interval
from k2rl.tracking.metrics import read_metrics
from k2rl.tracking.restarts import read_restarts
from k2rl.tracking.timeline import read_timeline

FILE = "summary.json"


class EvalSummary(msgspec.Struct, frozen=True):
    """An evaluation without its examples; `reward` and `ci95` are null if nothing was scored."""

    reward: float | None
    n: int
    ci95: Interval | None
    failed: int = 0
    per_kind: dict[str, KindResult] = {}


class GainSummary(msgspec.Struct, frozen=True):
    """`eval_after` minus `eval_before`: what RL alone added."""

    reward: float
    ci95: Interval


class Summary(msgspec.Struct, frozen=True, omit_defaults=False):
    """What a run achieved; an evaluation that has not happened is null.

    `eval_before` was made directly before RL, after any warm start, so that `rl_gain` is RL's alone;
    `eval_base` is the untouched model and exists only if there was a warm start.
    `restarts` counts what died and was started again: a vLLM, or all workers.
    `samples_per_second` counts training episodes over the seconds of the RL steps, training and
    weight updates included. `failed_episodes` counts rollouts and evaluations.
    """

    eval_before: EvalSummary | None
    eval_after: EvalSummary | None
    steps: int
    wall_seconds: float
    samples_per_second: float
    failed_episodes: int
    rl_gain: GainSummary | None = None
    eval_base: EvalSummary | None = None
    model: str | None = None
    env: str | None = None
    seed: int | None = None
    restarts: int = 0
    #: Of `k2rl sft`: held-out negative log-likelihood (nats a token) of the untouched model, and the last.
    nll_before: float | None = None
    nll_after: float | None = None


def summarise_run(run_dir: Path) -> Summary:
    """Work out the summary of a run, finished or not, from `run_dir` alone."""
    rows = read_metrics(run_dir)
    evaluations = load_results(run_dir)
    config = read_config(run_dir)
    episodes = sum(row.get("rollout/episodes", 0.0) for row in rows)
    seconds = sum(row.get("time/step_s", 0.0) for row in rows)
    added = reward_gain(evaluations.get("before"), evaluations.get("after"))
    failed = sum(row.get("rollout/failed", 0.0) for row in rows)
    return Summary(
        eval_before=_eval_summary(evaluations.get("before")),
        eval_after=_eval_summary(evaluations.get("after")),
        steps=int(rows[-1]["step"]) if rows else 0,
        wall_seconds=max((phase.end for phase in read_timeline(run_dir)), default=0.0),
        samples_per_second=episodes / seconds if seconds > 0 else 0.0,
        failed_episodes=int(failed) + sum(result.failed for result in evaluations.values()),
        rl_gain=None if added is None else GainSummary(added.mean, added.ci95),
        eval_base=_eval_summary(evaluations.get("base")),
        model=config.get("model", {}).get("path"),
        env=config.get("env", {}).get("id"),
        seed=config.get("seed"),
        restarts=len(read_restarts(run_dir)),
        nll_before=next((row["eval/nll"] for row in rows if row["step"] == 0 and "eval/nll" in row), None),
        nll_after=next(
            (row["eval/nll"] for row in reversed(rows) if row["step"] and "eval/nll" in row), None
        ),
    )


def write_summary(run_dir: Path) -> Summary:
    """Work out the summary of `run_dir`, write it to `summary.json` and return it."""
    summary = summarise_run(run_dir)
    path = run_dir / FILE
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    unfinished.replace(path)
    return summary


def read_config(run_dir: Path) -> Mapping[str, Any]:
    """The run's `config.yaml` as plain values; empty if it has none."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return {}
    config = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _eval_summary(result: EvaluationResult | None) -> EvalSummary | None:
    if result is None:
        return None
    return EvalSummary(result.reward, result.n, result.ci95, result.failed, result.per_kind)
