"""What `k2rl train`, `k2rl sft` and `k2rl eval` do once their configuration is composed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from k2rl import composition, sft
from k2rl.config import Config
from k2rl.errors import ConfigError, RunError
from k2rl.launch import check_recordings, execute, execute_evaluation
from k2rl.lifecycle import Interrupted, resume_step
from k2rl.models import hub
from k2rl.ownership import owned
from k2rl.preflight import preflight
from k2rl.rollouts.recording import FOLDER

INTERRUPTED_EXIT_CODE = 130


def train(overrides: Sequence[str], multirun: bool) -> int:
    """Check every job before the first one starts, then run them.

    Raises:
        ConfigError: one line; nothing was started.
    """
    _quiet()
    overrides = composition.resumed(overrides, multirun)
    with _checking():
        for job in composition.jobs(overrides, multirun):
            with closing(preflight(composition.compose(job))) as prepared:
                resume_step(prepared)
                check_recordings(prepared)
    return composition.run_jobs(overrides, multirun, _reporting_errors(_train))


def fine_tune(overrides: Sequence[str], multirun: bool) -> int:
    """As `train`, with chats to imitate in place of rollouts.

    Raises:
        ConfigError: one line; nothing was started.
    """
    _quiet()
    overrides = composition.resumed(overrides, multirun)
    if not any(override.startswith("name=") for override in overrides):
        overrides = ["name=sft", *overrides]
    with _checking():
        for job in composition.jobs(overrides, multirun):
            resume_step(sft.prepare(composition.compose(job)))
    return composition.run_jobs(overrides, multirun, _reporting_errors(_fine_tune))


def evaluate(overrides: Sequence[str]) -> int:
    """Greedy episodes of a checkpoint on the held-out tasks.

    Raises:
        ConfigError: one line; nothing was started.
    """
    _quiet()
    overrides = [*overrides, "name=eval"]
    with _checking():
        preflight(composition.compose(overrides), training=False).close()
    return composition.run_jobs(overrides, False, _reporting_errors(_evaluate))


def _train(config: Config, run_dir: Path) -> None:
    record = partial(composition.record, config, composition.own_overrides(), run_dir)
    with closing(preflight(config)) as prepared:
        summary = execute(prepared, run_dir, record)
    _say(f"report:  {run_dir / 'report.html'}")
    _say(f"summary: {run_dir / 'summary.json'}")
    if (run_dir / "model").exists():
        _say(f"model:   {run_dir / 'model'}")
    if (run_dir / FOLDER).exists():
        _say(f"rollouts: {run_dir / FOLDER}")
    for name, result in (("before RL", summary.eval_before), ("after RL", summary.eval_after)):
        if result is not None and result.reward is not None and result.ci95 is not None:
            _say(f"{name:<10} held-out reward {_estimate(result.reward, result.ci95)}, n={result.n}")


def _fine_tune(config: Config, run_dir: Path) -> None:
    record = partial(composition.record, config, composition.own_overrides(), run_dir)
    summary = sft.execute(sft.prepare(config), run_dir, record)
    _say(f"report:  {run_dir / 'report.html'}")
    _say(f"summary: {run_dir / 'summary.json'}")
    _say(f"model:   {run_dir / 'model'}")
    if summary.nll_before is not None and summary.nll_after is not None:
        _say(f"held-out NLL {summary.nll_before:.3f} -> {summary.nll_after:.3f} nats a token")


def _evaluate(config: Config, run_dir: Path) -> None:
    composition.record(config, composition.own_overrides(), run_dir)
    with closing(preflight(config, training=False)) as prepared:
        result = execute_evaluation(prepared, run_dir)
    if result.reward is None or result.ci95 is None:
        raise RunError(f"none of {result.failed} episodes was scored")
    _say(f"reward {_estimate(result.reward, result.ci95)}, n={result.n}, failed {result.failed}")
    for kind, part in result.per_kind.items():
        _say(f"  {kind:<16} {'-' if part.reward is None else f'{part.reward:.3f}'} (n={part.n})")
    _say(f"episodes: {run_dir / 'evaluations' / f'{result.name}.json'}")


def _reporting_errors(job: Callable[[Config, Path], None]) -> Callable[[Config, Path], int]:
    """A job that owns its folder and has a log there, whose end is an exit code and a line, no traceback."""

    def run(config: Config, run_dir: Path) -> int:
        try:
            with owned(run_dir, fresh=config.resume is None):
                _log_to(run_dir / "logs" / "driver.log")
                job(config, run_dir)
        except (ConfigError, RunError) as error:
            _say(f"k2rl: {error}", sys.stderr)
            return error.exit_code
        except Interrupted as stopped:
            _say(f"k2rl: interrupted {stopped}", sys.stderr)
            return INTERRUPTED_EXIT_CODE
        return 0

    return run


def _estimate(reward: float, ci95: tuple[float, float]) -> str:
    return f"{reward:.3f} (95 % interval {ci95[0]:.3f} to {ci95[1]:.3f})"


def _say(text: str, file: TextIO | None = None) -> None:
    print(text, file=file, flush=True)


def _quiet() -> None:
    """Libraries' progress bars and start-up chatter would tear the live view."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def _checking() -> Iterator[None]:
    """Say what happens before a live view can: checks of some seconds, and perhaps a download of minutes."""
    _say("… checks of the configuration, the environment and the model")
    logger, handler = logging.getLogger(hub.__name__), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("… %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=path,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
