"""What `k2rl train` and `k2rl eval` do once their configuration is composed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from k2rl import composition
from k2rl.config import Config
from k2rl.errors import ConfigError, RunError

INTERRUPTED = 130


def train(overrides: Sequence[str], multirun: bool) -> int:
    """Check every job before the first one starts, then run them.

    Raises:
        ConfigError: one line; nothing was started.
    """
    _quiet()
    from k2rl.preflight import preflight

    overrides = composition.resumed(overrides)
    for job in composition.jobs(overrides, multirun):
        preflight(composition.compose(job))
    return composition.run_jobs(
        overrides, multirun, lambda config, run_dir: _train(config, run_dir, overrides)
    )


def _train(config: Config, run_dir: Path, overrides: Sequence[str]) -> int:
    from k2rl.launch import Interrupted, execute
    from k2rl.preflight import preflight

    prepared = preflight(config)
    composition.record(config, _job_overrides(overrides), run_dir)
    _log_to(run_dir / "logs" / "driver.log")
    try:
        summary = execute(prepared, run_dir)
    except (ConfigError, RunError) as error:
        print(f"k2rl: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stopped:
        print(f"k2rl: interrupted {stopped}", file=sys.stderr)
        return INTERRUPTED
    print(
        f"report:  {run_dir / 'report.html'}\nsummary: {run_dir / 'summary.json'}\nmodel:   {run_dir / 'model'}"
    )
    for name, result in (("before RL", summary.eval_before), ("after RL", summary.eval_after)):
        if result is not None and result.reward is not None and result.ci95 is not None:
            low, high = result.ci95
            print(
                f"{name:<10} held-out reward {result.reward:.3f} (95 % {low:.3f} to {high:.3f}, n={result.n})"
            )
    return 0


def _job_overrides(overrides: Sequence[str]) -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) or list(overrides)


def evaluate(overrides: Sequence[str]) -> int:
    """Greedy episodes of a checkpoint on the held-out tasks.

    Raises:
        ConfigError, RunError: see `k2rl.evaluation.evaluate`.
    """
    _quiet()
    from k2rl.preflight import preflight

    overrides = [*overrides, "name=eval"]
    preflight(composition.compose(overrides), training=False)
    return composition.run_jobs(overrides, False, _evaluate)


def _evaluate(config: Config, run_dir: Path) -> int:
    from k2rl.launch import Interrupted, execute_evaluation
    from k2rl.preflight import preflight

    prepared = preflight(config, training=False)
    composition.record(config, _job_overrides([]), run_dir)
    _log_to(run_dir / "logs" / "driver.log")
    try:
        result = execute_evaluation(prepared, run_dir)
    except (ConfigError, RunError) as error:
        print(f"k2rl: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stopped:
        print(f"k2rl: interrupted {stopped}", file=sys.stderr)
        return INTERRUPTED
    if result.reward is None or result.ci95 is None:
        print(f"k2rl: none of {result.failed} episodes was scored", file=sys.stderr)
        return 1
    low, high = result.ci95
    print(f"reward {result.reward:.3f} (95 % {low:.3f} to {high:.3f}, n={result.n}, failed {result.failed})")
    for kind, part in result.per_kind.items():
        print(f"  {kind:<16} {'-' if part.reward is None else f'{part.reward:.3f}'} (n={part.n})")
    print(f"episodes: {run_dir / 'evaluations' / f'{result.name}.json'}")
    return 0


def _quiet() -> None:
    """Libraries' progress bars and start-up chatter would tear the live view."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=path,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
